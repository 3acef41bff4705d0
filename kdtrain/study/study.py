"""One study from its recipe to its report."""

from pathlib import Path

from kdtrain.study.costs import measure_costs
from kdtrain.study.plan import StudyRecipe, unfold
from kdtrain.study.report import write_report
from kdtrain.study.results import collect
from kdtrain.study.shared import prepare
from kdtrain.study.work import run_cells
from kdtrain.tasks.base import SharedInputs
from kdtrain.tasks.classification.task import Classification


def run_study(study: StudyRecipe) -> str:
    """Run what is not finished, measure, and write the report; give its Markdown.

    A study that was killed goes on where it stopped, down to the last checkpoint of each run that was at work.

    Raises:
        KdtrainError: anything wrong with recipe, data, teacher or machine; runs that failed are named at the end.
    """
    folder = Path(study.output)
    cells = prepare(study, unfold(study))
    shared = SharedInputs()
    data = {cell.task: Classification(cell.recipe, shared).data for cell in cells}
    run_cells(cells, data, study.workers, folder / "logs")
    tasks = collect(cells, {task: one.metric for task, one in data.items()})
    return write_report(folder.name, tasks, measure_costs(cells, folder), folder)
