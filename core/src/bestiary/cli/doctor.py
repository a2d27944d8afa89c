"""`bestiary doctor`: look at the installation, and say how to mend what is broken. What is looked at: `checks`."""

from dataclasses import asdict

from bestiary.cli.checks import CHECKS, Finding
from bestiary.cli.options import AsJson
from bestiary.cli.terminal import columns, one_line, print_json

__all__ = ["command"]

_MARKS = {"ok": "", "note": "note", "broken": "BROKEN"}


def command(*, json: AsJson = False) -> int:
    """Print what was found; the status is 1 where something is broken."""
    found: dict[str, list[Finding]] = {}
    for section, check in CHECKS.items():
        found[section] = list(check())
        if not json:
            rows = [(f"  {one_line(f.name)}", _MARKS[f.status], one_line(f.value)) for f in found[section]]
            print(f"{section}\n{columns(rows)}", flush=True)
    num_broken = sum(finding.status == "broken" for findings in found.values() for finding in findings)
    if json:
        sections = {section: [asdict(finding) for finding in findings] for section, findings in found.items()}
        print_json({"broken": num_broken, **sections})
    else:
        print(f"\n{num_broken} broken" if num_broken else "\nNothing is broken.")
    return 1 if num_broken else 0
