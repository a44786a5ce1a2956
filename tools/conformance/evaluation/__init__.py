"""The evaluation's golden files: what each one holds is in its README; one check a family.

Files are known by their names' beginnings, so that other sizes (`gda_golden_d512_s16.npz`), other
seeds and partial folders work. A golden whose inputs are not in the folder is listed as not
checked, with the file that it needs. Expected values are read only to compare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from tools.conformance.evaluation import calibration, few_shot, ood, scores, training
from tools.conformance.evaluation.golden import Golden, MissingInputsError
from tools.conformance.table import Row, not_built, not_comparable

Check = Callable[[Golden], Iterator[Row]]

CHECKS: dict[str, Check] = {
    "align_uniform_golden": scores.align_uniform,
    "amu_forward_golden": few_shot.amu_forward,
    "amu_train_golden": training.amu_train,
    "amu_uncertainty_golden": few_shot.amu_uncertainty,
    "clip_adapter_golden": few_shot.clip_adapter,
    "clipscore_golden": scores.clipscore,
    "dassl_fewshot_sampler_golden": few_shot.sampler,
    "ece_golden": calibration.ece,
    "euclip_geometry_golden": scores.euclip_geometry,
    "fpr95_variants_golden": ood.fpr95_variants,
    "gda_base2new_golden": few_shot.gda_base_to_new,
    "gda_golden": few_shot.gda,
    "linear_probe_sklearn_golden": few_shot.linear_probe,
    "mano_golden": calibration.mano,
    "mcm_golden": ood.mcm,
    "retrieval_clip_benchmark_golden": scores.retrieval,
    "selection_": scores.selection,
    "tip_adapter_F_golden": training.tip_adapter_f,
    "tip_adapter_golden": few_shot.tip_adapter,
    "vim_ood_golden": ood.vim,
    "wiseft_golden": scores.wise_ft,
    "zeroshot_clip_benchmark_golden": scores.zero_shot,
}
NOT_BUILT = {
    "clipn_golden": "CLIPN",
    "fairpivara_mi_golden": "FairPIVARA mutual information",
    "perceptionclip_golden": "perceptionCLIP",
    "prograd_golden": "ProGrad",
    "tpt_golden": "TPT",
    "weat_golden": "WEAT",
}
INPUTS = "fewshot_inputs_"


def check(folder: Path) -> Iterator[Row]:
    """Run every golden file of a known name through the suite's own functions."""
    for path in sorted(folder.glob("*.npz")):
        name = path.stem
        found = [stem for stem in CHECKS if name.startswith(stem)]
        if found:
            try:
                yield from CHECKS[max(found, key=len)](Golden.read(path))
            except MissingInputsError as error:
                yield not_comparable(name, f"not checked: {error}")
            continue
        unbuilt = [what for stem, what in NOT_BUILT.items() if name.startswith(stem)]
        if unbuilt:
            yield not_built(name, unbuilt[0])
        elif not name.startswith(INPUTS):
            yield not_built(name, "no check knows a file of this name")
