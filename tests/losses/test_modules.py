"""The modules are their functions with the options fixed."""

import pytest
import torch

from kdkernels import JSD, KDLoss, LinearKDLoss, kd_loss, linear_kd_loss
from tests.support.inputs import make_case

OPTIONS = {"divergence": JSD(0.3), "temperature": 2.0, "ce_weight": 0.5, "reduction": "mean"}


def test_kd_loss_module_equals_the_function() -> None:
    case = make_case()
    tensors = (case.student_logits, case.teacher_logits, case.labels)
    module = KDLoss(**OPTIONS)
    assert torch.equal(module(*tensors), kd_loss(*tensors, **OPTIONS))
    weight = torch.rand(len(case.labels), device=case.labels.device)
    late = {"token_weight": weight, "num_items_in_batch": 30}
    assert torch.equal(module(*tensors, **late), kd_loss(*tensors, **late, **OPTIONS))
    assert list(module.parameters()) == []


def test_linear_kd_loss_module_equals_the_function() -> None:
    case = make_case()
    tensors = (case.student_hidden, case.student_weight, case.teacher, case.labels)
    options = {**OPTIONS, "chunk_bytes": 8 * 67 * 4, "static_shapes": True}
    module = LinearKDLoss(**options)
    late = {"student_bias": case.student_bias, "num_items_in_batch": torch.tensor(30)}
    assert torch.equal(module(*tensors, **late), linear_kd_loss(*tensors, **late, **options))


@pytest.mark.parametrize("module", [KDLoss, LinearKDLoss])
def test_bad_options_are_refused_at_construction(module) -> None:
    with pytest.raises(ValueError, match="temperature must be above 0, got -1"):
        module(temperature=-1.0)
    with pytest.raises(ValueError, match="softcap must be above 0, got -30"):
        module(softcap=-30.0)
    with pytest.raises(TypeError, match="temprature"):
        module(temprature=2.0)


def test_options_are_shown() -> None:
    assert repr(KDLoss(temperature=2.0, divergence="jsd")) == "KDLoss(temperature=2.0, divergence='jsd')"
