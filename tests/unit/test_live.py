"""How a running federation looks, with a clock that stands still."""

import io
import logging
import os
from dataclasses import replace
from pathlib import Path

import pytest

from fedloge import live, serve
from fedloge.live import Screen, View, events, round_line, table
from server.status import Status

NOW = 1_000_000.0
TRAINING = Status(
    phase="training",
    round=7,
    rounds=20,
    chosen=["berlin", "lyon", "oslo", "paris"],
    waiting=["berlin"],
    refused={"oslo": "values that are not finite"},
    quarantined={"paris": {"round": 3, "reason": "absurd count"}, "oslo": {"round": 7, "reason": "not finite"}},
    bad_cards={"rome": "its class list is another"},
    generic=0.612,
    generic_local=0.584,
    personal=0.73,
    judged_round=5,
    traffic={"oslo": {"down": 45_000_000, "up": 0}, "paris": {"down": 11_400_000, "up": 1_234_000}},
    deadline=NOW + 250,
    left=700.0,
)
VIEW = View(
    "lungs",
    "fl.example.org:9092",
    True,
    TRAINING,
    sites=("berlin", "lyon", "oslo", "paris", "rome"),
    online=frozenset(["berlin", "oslo", "paris", "rome"]),
    shut_out={"kiel": "revoked on 2026-01-02 03:04 UTC"},
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_round_under_way() -> None:
    assert table(VIEW, NOW) == [
        "lungs  fl.example.org:9092  training, round 7 of 20, about 12 min left",
        "  sites       4 of 5 online; absent: lyon",
        "  replies     2 in, 1 awaited: berlin (for 4 min at most)",
        "  bytes       28.2 MB down, 1.23 MB up a site in this round",
        "  refused     oslo: values that are not finite",
        "  refused     paris: absurd count (round 3)",
        "  unfit       rome: its class list is another",
        "  shut out    kiel: revoked on 2026-01-02 03:04 UTC",
        "  accuracy    generic 61.2 % on the test set",
        "              at the sites after round 5: generic 58.4 %, personal 73.0 %",
    ]


def test_before_the_first_round() -> None:
    view = View("lungs", "localhost:9092", True, Status(phase="waiting", rounds=20), sites=("berlin", "lyon"))
    assert table(view, NOW) == [
        "lungs  localhost:9092  waiting for sites, round 0 of 20",
        "  sites       0 of 2 online; absent: berlin, lyon",
    ]


def test_a_server_that_does_not_run() -> None:
    view = replace(VIEW, running=False, status=replace(TRAINING, message="stopped"), online=frozenset())
    lines = table(view, NOW)
    assert lines[0] == "lungs  fl.example.org:9092  not running (last: training), round 7 of 20"
    assert lines[1] == "  sites       5 registered: berlin, lyon, oslo, paris, rome"
    assert not any(line.startswith("  replies") for line in lines)
    assert lines[-1] == "  note        stopped"


def test_many_sites_stay_on_one_screen() -> None:
    sites = tuple(f"site-{n:03}" for n in range(200))
    status = replace(TRAINING, chosen=list(sites), waiting=list(sites), refused=dict.fromkeys(sites, "late"))
    lines = table(
        replace(VIEW, sites=sites, online=frozenset(), status=status, shut_out=dict.fromkeys(sites, "x")), NOW
    )
    assert len(lines) < 30
    assert "absent: site-000, site-001, site-002, site-003, site-004 and 195 more" in lines[1]


def test_events_tell_what_changed() -> None:
    before = replace(VIEW, online=frozenset(["lyon"]), shut_out={}, sites=(*VIEW.sites[:4], "kiel"))
    calm = replace(TRAINING, bad_cards={}, judged_round=0)
    assert events(replace(before, status=calm), VIEW) == [
        "berlin is online (4 of 5 online)",
        "oslo is online (4 of 5 online)",
        "paris is online (4 of 5 online)",
        "rome is online (4 of 5 online)",
        "lyon is offline (4 of 5 online)",
        "rome was invited",
        "kiel is shut out: revoked on 2026-01-02 03:04 UTC",
        "rome cannot take part: its class list is another",
        "at the sites after round 5: generic 58.4 %, personal 73.0 %",
    ]
    assert events(VIEW, VIEW) == []


def test_the_first_view_tells_no_old_news() -> None:
    assert events(None, replace(VIEW, status=Status(), online=frozenset())) == []


def test_phases_and_messages_are_events() -> None:
    after = replace(VIEW, status=replace(TRAINING, phase="judging", message="round 7 had no quorum"))
    assert events(VIEW, after) == ["judging the final models", "round 7 had no quorum"]
    assert events(VIEW, replace(VIEW, status=replace(TRAINING, phase="waiting"))) == []  # as between any two rounds


def test_a_new_run_that_has_not_said_anything_yet_is_no_news_of_accuracies() -> None:
    again = replace(VIEW, status=Status())
    assert [line for line in events(VIEW, again) if "accuracy" in line or "at the sites" in line] == []
    assert [line for line in events(again, VIEW) if line.startswith("at the sites after round 5")]


def test_a_finished_round_is_one_line() -> None:
    entry = {"round": 3, "sites": ["a"], "refused": {"b": "late"}, "missing": ["c", "d"]}
    assert round_line(entry, 20) == "round 3 of 20: 1 reply, refused b (late), missing c, d"
    judged = {"round": 5, "sites": ["a", "b"], "refused": {}, "missing": []}
    judged["evaluation"] = {"generic": {"psi": {"top1": 0.5}}, "personal": {}}
    assert round_line(judged, 20) == "round 5 of 20: 2 replies, generic 50.0 % on the test set"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (59, "59 s"), (61, "1 min"), (5400, "90 min"), (7300, "2 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert live.duration(seconds) == text


def test_a_terminal_is_rewritten_in_place_and_warnings_stay_above(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((60, 3)))
    stream = Terminal()
    screen = Screen(stream)
    logger = logging.Logger("test")
    logger.addHandler(screen)
    screen.show(VIEW)
    first = stream.getvalue()
    assert first.splitlines() == [line[:59] for line in table(VIEW, NOW)[:2]]
    logger.warning("a warning")
    logger.info("an event")
    assert stream.getvalue() == f"{first}\x1b[2F\x1b[Ja warning\n{first}"
    screen.close()
    screen.show(VIEW)
    assert stream.getvalue().endswith(f"a warning\n{first}\n{first}")


def test_a_log_gets_events_and_no_table() -> None:
    stream = io.StringIO()
    screen = Screen(stream)
    logger = logging.Logger("test")
    logger.addHandler(screen)
    screen.show(VIEW)
    logger.info("an event")
    assert stream.getvalue() == "an event\n"


def test_a_terminal_that_is_gone_stops_nothing() -> None:
    stream = Terminal()
    screen = Screen(stream)
    stream.close()
    screen.show(VIEW)
    screen.show(VIEW)


def test_the_outcome_names_every_site() -> None:
    result = {
        "generic": {"psi realigned": {"top1": 0.5}, "psi": {"top1": 0.4}},
        "generic_local": {"psi realigned": {"top1": 0.25, "per_site": {"a": 0.25}}},
        "personal": {"phi+psi_k": {"top1": 0.75, "per_site": {"a": 0.5, "b": 1.0}}},
    }
    assert serve.outcome(result).splitlines() == [
        "model     judged on                             top-1",
        "--------  ---------------------  -------------  -----",
        "generic   the test set           psi realigned   50.0",
        "generic   the sites' own images  psi realigned   25.0",
        "personal  the sites' own images  phi+psi_k       75.0",
        "",
        "site  generic  personal",
        "----  -------  --------",
        "a     25.0     50.0",
        "b     -        100.0",
    ]
    assert serve.outcome({"generic": {}, "generic_local": None, "personal": {}}).count("\n") == 1


def test_new_rounds_are_read_once_and_damage_is_passed_over(tmp_path: Path) -> None:
    from fedloge.supervisor import new_rounds  # needs Flower

    assert new_rounds(tmp_path, 0) == []
    (tmp_path / "events.jsonl").write_text('und": 1}\n{"round": 2}\nnull\n{"round": 3}\n{"round": 3, "more": 1}\n{"rou')
    assert new_rounds(tmp_path, 2) == [{"round": 3, "more": 1}]
    assert [entry["round"] for entry in new_rounds(tmp_path, 0)] == [2, 3]


def test_refusals_are_told_once_in_a_while() -> None:
    from fedloge.supervisor import AGAIN, Refusals

    now = [0.0]
    refusals = Refusals(lambda: now[0])
    line = "ERROR :     [Fleet.ActivateNode] Activation failed: No SuperNode found with the given public key."
    [first] = refusals.warnings(line, 9092)
    assert "its key is not registered here" in first
    assert [refusals.warnings(line, 9092) for _ in range(3)] == [[], [], []]
    now[0] = AGAIN
    assert refusals.warnings(line, 9092) == [f"{first} (3 times more since the last time)"]
    handshake = "TLS handshake of ipv4:10.1.2.3:47474 with ipv4:10.0.0.1:9092 failed: UNAVAILABLE: Socket closed"
    [told] = refusals.warnings(handshake, 9092)
    assert "10.1.2.3" in told
    assert refusals.warnings(handshake.replace(":47474", ":47475"), 9092) == []  # another port of the same machine
    assert refusals.warnings(handshake.replace("10.1.2.3", "10.9.9.9"), 1234) == []  # not at the sites' door
    [other] = refusals.warnings("E1120 ssl.cc:3238] No match found for server name: nope.example", 9092)
    assert "'nope.example'" in other
    for number in range(3000):
        refusals.due(str(number))
    assert len(refusals._last) <= 1001
