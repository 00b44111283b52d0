"""Whether a side of a federation is well, in one line: `fedloge status PATH --healthy`, for whoever keeps it running.

A server is well while its process lives and the run moves: waiting for sites is said, and is no illness; a round that
is open long after it should have been closed is. A site is well while the server answers it, and when the federation
is over. Torch is not imported: this is asked every few seconds.
"""

from pathlib import Path

from client.outbox import HEARD
from common.errors import UserError
from fedloge.live import PHASES, duration
from fedloge.serve import LOCK, server_process
from server import status as board

STARTING = 180.0  # seconds a server may take until its first word
LATE = 60.0  # seconds after its deadline in which a round must be closed
SILENCE = 60.0  # seconds for which a site may be without an answer


def of(folder: Path, now: float) -> str:
    """What is well, at time `now` (seconds since 1970); a UserError says what is not."""
    return _server(folder / "run", now) if (folder / "federation.toml").exists() else _site(folder, now)


def _server(run: Path, now: float) -> str:
    if server_process(run) is None:
        raise UserError(f"{run.parent}: no server is running")
    status = board.read(run)
    began = (run / LOCK).stat().st_mtime
    if status is None or status.updated < began:  # it is that of a server before
        if now - began > STARTING:
            raise UserError(
                f"{run.parent}: the server was started {duration(now - began)} ago and has said nothing yet"
            )
        return "starting"
    text = PHASES[status.phase]
    if status.phase == "gave-up":
        raise UserError(f"{run.parent}: {text}: {status.message}")
    if status.round:
        text += f", round {status.round} of {status.rounds}"
    if status.deadline and now > status.deadline + LATE:
        raise UserError(f"{run.parent}: {text}, which should have ended {duration(now - status.deadline)} ago")
    return f"{text}, {sum(bool(site.get('online')) for site in status.sites.values())} sites online"


def _site(state: Path, now: float) -> str:
    if (state / "over").exists():
        return "the federation is over"
    try:
        silent = now - (state / HEARD).stat().st_mtime
    except OSError:
        raise UserError(f"{state}: no server has answered a site here yet") from None
    if abs(silent) > SILENCE:  # in the future: the clock was set back
        raise UserError(f"{state}: the server has not answered for {duration(abs(silent))}")
    return f"the server answered {duration(max(silent, 0.0))} ago"
