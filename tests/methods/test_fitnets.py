"""FitNets (arXiv 1412.6550): hints alone, then soft labels alone."""

from kdtrain.methods.base import Step
from tests.methods.by_hand import Rows, assert_split_changes_nothing, build


def test_two_stages_1412_6550() -> None:
    method = build("fitnets", hint_share=0.25, feature_weight=3.0, kd_weight=0.7, ce_weight=0.2)
    weights = [method.weights(Step(number, 101)) for number in range(101)]
    assert weights[0] == weights[24] == {"kd": 0.0, "ce": 0.0, "feature": 3.0}
    assert weights[25] == weights[100] == {"kd": 0.7, "ce": 0.2, "feature": 0.0}


def test_a_split_batch_has_the_gradient_of_the_whole() -> None:
    rows = Rows(((1, 2), (2, 4)))
    for number in (0, 9):
        assert_split_changes_nothing(build("fitnets"), rows, Step(number, 10))
