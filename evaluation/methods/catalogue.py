"""Every method and few-shot learner by name, with its keywords. Nothing heavy is imported here.

A configuration can be read and checked without torch: a factory imports its method when it is
built. To add a method: its file beside this one, and a factory here. Methods that must
back-propagate into a tower (prompt learning, test-time tuning) have their place here too: a Subject
gives them the loaded encoder (`subject.features.encoder`).
"""

# The annotations below are read at run time: no `from __future__ import annotations`.

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from configs.errors import ConfigError
from configs.registry import Tagged, Variant
from evaluation.methods.registry import (  # the registries are this module's too
    Compat,
    CSearch,
    FprDefinition,
    Learner,
    Method,
    Uncertainty,
)
from evaluation.methods.registry import (
    learners as learners,
)
from evaluation.methods.registry import (
    methods as methods,
)

Pair = tuple[float, float]
Share = Annotated[float, Field(gt=0, lt=1)]


@learners.register("tip_adapter")
def tip_adapter(*, search_scale: Pair = (7.0, 3.0), compat: Compat = "none") -> Learner:
    """Tip-Adapter, training-free (arXiv:2207.09519); `search_scale` bounds beta and alpha."""
    from evaluation.methods.tip_adapter import TipAdapter

    return TipAdapter(search_scale)


@learners.register("tip_adapter_f")
def tip_adapter_f(
    *,
    search_scale: Pair = (7.0, 3.0),
    epochs: PositiveInt = 20,
    batch_size: PositiveInt = 256,
    compat: Compat = "none",
) -> Learner:
    """Tip-Adapter-F: trained keys (arXiv:2207.09519)."""
    from evaluation.methods.tip_adapter import TipAdapter

    return TipAdapter(search_scale, epochs=epochs, batch_size=batch_size)


@learners.register("clip_adapter")
def clip_adapter(
    *,
    epochs: PositiveInt = 50,
    learning_rate: float = 1e-3,
    batch_size: PositiveInt = 32,
    compat: Compat = "none",
) -> Learner:
    """CLIP-Adapter (arXiv:2110.04544)."""
    from evaluation.methods.clip_adapter import ClipAdapter

    return ClipAdapter(epochs=epochs, learning_rate=learning_rate, batch_size=batch_size)


@learners.register("gda")
def gda(*, compat: Compat = "none") -> Learner:
    """Gaussian discriminant analysis, training-free (arXiv:2402.04087)."""
    from evaluation.methods.gda import Gda

    return Gda()


@learners.register("amu_tuning")
def amu_tuning(
    *,
    alpha: float = 0.5,
    weight: float = 0.35,
    uncertainty: Uncertainty = "moment",
    power: float = 0.4,
    kappa: float | None = None,
    epochs: PositiveInt = 50,
    batch_size: PositiveInt = 8,
    learning_rate: float = 1e-3,
    compat: Compat = "none",
) -> Learner:
    """AMU-Tuning (arXiv:2404.08958); `kappa` None is C / 4 (250, as published, at C = 1000)."""
    from evaluation.methods.amu import AmuTuning, Fusion

    fusion = Fusion(alpha, weight, uncertainty, power, kappa)
    return AmuTuning(fusion, epochs=epochs, batch_size=batch_size, learning_rate=learning_rate)


@methods.register("zero_shot")
def zero_shot(*, combine: Literal["vectors", "scores"] = "vectors") -> Method:
    """Zero-shot classification with the dataset's prompts (arXiv:2103.00020, 2210.07183)."""
    from evaluation.methods.zero_shot import ZeroShot

    return ZeroShot(combine)


@methods.register("retrieval")
def retrieval(*, cutoffs: tuple[PositiveInt, ...] = (1, 5, 10)) -> Method:
    """Image-text retrieval in both directions."""
    from evaluation.methods.retrieval import Retrieval

    return Retrieval(cutoffs)


@methods.register("selection")
def selection() -> Method:
    """Image-caption selection (Winoground, SugarCrepe)."""
    from evaluation.methods.selection import Selection

    return Selection()


@methods.register("association")
def association() -> Method:
    """Association of images with a cue (WinoGAViL, arXiv:2207.12576)."""
    from evaluation.methods.association import Association

    return Association()


@methods.register("clip_score")
def clip_score(*, weight: float = 2.5) -> Method:
    """CLIPScore and RefCLIPScore (arXiv:2104.08718)."""
    from evaluation.methods.clipscore import ClipScore

    return ClipScore(weight)


@methods.register("linear_probe")
def linear_probe(*, search: CSearch = "openai", validation: Share = 0.2) -> Method:
    """Logistic regression on the train split; without a val split, a share of train is held out."""
    from evaluation.methods.linear_probe import LinearProbe

    return LinearProbe(search, validation)


@methods.register("few_shot")
def few_shot(
    *,
    learners: tuple[Annotated[Variant, Tagged(learners)], ...],
    shots: tuple[PositiveInt, ...] = (1, 2, 4, 8, 16),
    seeds: PositiveInt = 10,
    validation: Literal["few", "all"] = "few",
    auxiliary: str | None = None,
) -> Method:
    """Few-shot methods over shots x seeds 1..N, sampled as CoOp samples (arXiv:2109.01134).

    `validation` few: min(shots, 4) a class. `auxiliary`, for AMU-Tuning: `timm:MODEL`,
    `checkpoint:CHECKPOINT`, `file:FOLDER` with train.npy, val.npy and test.npy, or `pixels`.
    """
    from evaluation.methods.few_shot_sweep import FewShotSweep

    if auxiliary is None and any(section.name == "amu_tuning" for section in learners):
        raise ConfigError(
            "few_shot: amu_tuning needs features of an auxiliary encoder: set `auxiliary` beside "
            "`learners`, to timm:MODEL, checkpoint:CHECKPOINT, file:FOLDER or pixels."
        )
    return FewShotSweep(learners, shots, seeds, validation, auxiliary)


@methods.register("base_to_new")
def base_to_new(*, shots: PositiveInt = 16, seeds: PositiveInt = 3) -> Method:
    """GDA that learns the first half of the classes and generalizes to the other half."""
    from evaluation.methods.base_to_new import BaseToNew

    return BaseToNew(shots, seeds)


@methods.register("ood")
def ood(
    *,
    sets: tuple[str, ...],
    fpr95: FprDefinition = "vim",
    knn_k: PositiveInt = 50,
    mcm_temperature: float = 1.0,
) -> Method:
    """Out-of-distribution detection against other datasets of the run."""
    from evaluation.methods.ood import OutOfDistribution

    return OutOfDistribution(sets, fpr95, knn_k, mcm_temperature)


@methods.register("calibration")
def calibration(*, num_bins: PositiveInt = 15) -> Method:
    """ECE, adaptive ECE, Brier, NLL; and after a temperature fitted on validation."""
    from evaluation.methods.calibration import Calibration

    return Calibration(num_bins)


@methods.register("selective")
def selective() -> Method:
    """Risk over coverage, AURC; also with normalized logits."""
    from evaluation.methods.selective import Selective

    return Selective()


@methods.register("mano")
def mano(*, power: PositiveInt = 4, compat: Compat = "none") -> Method:
    """Accuracy estimation without labels (arXiv:2405.18979)."""
    from evaluation.methods.mano import Mano

    return Mano(power, compat)


@methods.register("worst_group")
def worst_group(
    *,
    attribute: str,
    with_label: bool = False,
    top: Literal[1, 5] = 1,
    leave_out: tuple[str, ...] = (),
) -> Method:
    """Accuracy of the worst group of an attribute (with_label: of each label and attribute)."""
    from evaluation.methods.worst_group import WorstGroup

    return WorstGroup(attribute, with_label, top, leave_out)


@methods.register("geometry")
def geometry() -> Method:
    """Modality gap, alignment, uniformity, cone, separability, effective rank."""
    from evaluation.methods.geometry import GeometryReport

    return GeometryReport()
