"""How near a run came to its bounds: error / bound of every comparison of `tests.support.budget`, at the end of the run."""

from collections.abc import Iterator

import pytest

from tests.support import budget

PROPERTY = "error / bound"

# A result that needs more of its bound is the next to fail on another machine.
NEAR = 0.7


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--ratios",
        type=int,
        default=0,
        metavar="N",
        help="print the N tests with the largest error / bound of a numeric comparison",
    )


@pytest.fixture(autouse=True)
def keep_ratios(request: pytest.FixtureRequest) -> Iterator[None]:
    """The largest ratio of a test becomes a property of it, which reports and JUnit files carry."""
    budget.ratios.clear()
    yield
    if budget.ratios:
        ratio, name = max(budget.ratios)
        request.node.user_properties.append((PROPERTY, f"{ratio:.3f} {name}"))


def print_ratios(terminalreporter: pytest.TerminalReporter) -> None:
    """The tests nearest to their bounds, as many as --ratios asks for."""
    found = [
        (float(value.split()[0]), value.partition(" ")[2], report.nodeid)
        for report in terminalreporter.getreports(
            ""
        )  # among them those of teardown, which know the properties
        for key, value in report.user_properties
        if key == PROPERTY
    ]
    most = terminalreporter.config.getoption("--ratios")
    if not most or not found:
        return
    terminalreporter.section("error / bound")
    near = sum(ratio > NEAR for ratio, _, _ in found)
    terminalreporter.line(f"{len(found)} tests compare numbers; {near} need more than {NEAR} of their bound")
    for ratio, name, test in sorted(found, reverse=True)[:most]:
        terminalreporter.line(f"{ratio:6.3f}  {test}  ({name})")
