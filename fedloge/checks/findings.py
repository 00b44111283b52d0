"""What a preflight has found, line by line. A check that fails, in whatever way, does not stop those after it."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

from common.errors import UserError

Result = Literal["PASS", "FAIL", "WARN", "SKIP"]  # WARN: it works, but should be known; SKIP: it could not be looked at
T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    name: str
    result: Result
    text: str

    def __str__(self) -> str:
        return f"{self.result}  {self.name}: {self.text}"


class Findings:
    """`show` hears of each as it comes."""

    def __init__(self, show: Callable[[Finding], None], debug: bool) -> None:
        self.found: list[Finding] = []
        self._show = show
        self._debug = debug

    @property
    def failed(self) -> int:
        return sum(finding.result == "FAIL" for finding in self.found)

    def passed(self, name: str, text: str) -> None:
        self._add(Finding(name, "PASS", text))

    def warn(self, name: str, text: str) -> None:
        self._add(Finding(name, "WARN", text))

    def fail(self, name: str, text: str) -> None:
        self._add(Finding(name, "FAIL", text))

    def skip(self, name: str, text: str) -> None:
        self._add(Finding(name, "SKIP", text))

    def attempt(self, name: str, check: Callable[[], T]) -> T | None:
        """What `check` gives; None, and a finding of this name, if it fails."""
        try:
            return check()
        except UserError as error:
            self.fail(name, str(error))
        except ImportError as error:
            self.fail(name, f"{error.name or error} is not installed here: install fedloge again (pip install .)")
        except OSError as error:
            self.fail(name, f"{error.filename or 'a file'}: {error.strerror or error}: check its folder and disk")
        except Exception as error:
            if self._debug:
                raise
            what = " ".join(f"{type(error).__name__}: {error}".split())
            self.fail(name, f"cannot be checked ({what}): say so to the makers, with what `fedloge --debug` shows")
        return None

    def table(self) -> dict[str, Any]:
        return {"ok": not self.failed, "checks": [asdict(finding) for finding in self.found]}

    def _add(self, finding: Finding) -> None:
        self.found.append(finding)
        self._show(finding)
