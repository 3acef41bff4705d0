"""Fused knowledge-distillation losses: exact, chunked, near the hardware limit."""

from .divergences import (
    JSD,
    TVD,
    AlphaBeta,
    ChiSquared,
    Decoupled,
    Divergence,
    ForwardKL,
    Renyi,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
)
from .features.batch_relations import (
    attention_transfer_loss,
    fsp_loss,
    linear_cka_loss,
    pkt_loss,
    rkd_angle_loss,
    rkd_distance_loss,
    similarity_preserving_loss,
)
from .features.contextual.loss import contextual_relation_loss
from .features.projection import cosine_loss, projection_mse
from .features.relations import relation_kl
from .logits.cross_term import teacher_cross_term
from .logits.kd_loss import kd_loss
from .logits.linear_kd_loss import linear_kd_loss
from .modules import KDLoss, LinearKDLoss
from .options import IGNORE_INDEX, Impl, Reduction
from .stats import KDStats
from .teachers import Teacher, TeacherCrossTerm, TeacherHead, TeacherLogits, TeacherTopK

__version__ = "0.1.0"

__all__ = [
    "IGNORE_INDEX",
    "JSD",
    "TVD",
    "AlphaBeta",
    "ChiSquared",
    "Decoupled",
    "Divergence",
    "ForwardKL",
    "Impl",
    "KDLoss",
    "KDStats",
    "LinearKDLoss",
    "Reduction",
    "Renyi",
    "ReverseKL",
    "SkewKL",
    "SkewReverseKL",
    "Teacher",
    "TeacherCrossTerm",
    "TeacherHead",
    "TeacherLogits",
    "TeacherTopK",
    "attention_transfer_loss",
    "contextual_relation_loss",
    "cosine_loss",
    "fsp_loss",
    "kd_loss",
    "linear_cka_loss",
    "linear_kd_loss",
    "pkt_loss",
    "projection_mse",
    "relation_kl",
    "rkd_angle_loss",
    "rkd_distance_loss",
    "similarity_preserving_loss",
    "teacher_cross_term",
]
