"""Every code of the doctor has an entry in docs/troubleshooting.md, and every entry has a code in the source."""

import re
from pathlib import Path

from kdtrain.doctor import GROUPS, Finding

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"


def codes() -> dict[str, str]:
    """The place of every code in the source; no code stands for two findings."""
    found: dict[str, str] = {}
    for path in sorted((ROOT / "kdtrain" / "doctor").glob("*.py")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            for code in re.findall(r'"(KD\d+)"', line):
                place = f"{path.relative_to(ROOT)}:{number}"
                assert code not in found, f"{place}: {code} is also that of {found[code]}"
                found[code] = place
    return found


def test_codes_and_entries_are_the_same() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    entries = {line[4:]: number for number, line in enumerate(lines, 1) if line.startswith("### ")}
    source = codes()
    assert len(source) > 40
    for code, place in source.items():
        assert code in entries, f"{place}: {code} has no entry in docs/troubleshooting.md"
    for code, number in entries.items():
        assert code in source, f"docs/troubleshooting.md:{number}: no check reports {code}"
    assert list(entries) == sorted(entries)


def test_entries_stand_under_their_group_and_say_something() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for entry in re.finditer(r"^### (KD(\d)\d\d)\n\n(.*)$", text, flags=re.MULTILINE):
        headings = re.findall(r"^## (.*)$", text[: entry.start()], flags=re.MULTILINE)
        assert headings[-1] == GROUPS[entry[2]], entry[1]
        assert entry[3].startswith("**") and len(entry[3].split()) > 3, entry[1]


def test_a_finding_links_to_its_entry() -> None:
    finding = Finding("error", "KD201", "the order is wrong")
    assert finding.link == "docs/troubleshooting.md#kd201" and (ROOT / finding.link.split("#")[0]).exists()
    assert finding.line() == "error    KD201  the order is wrong"
