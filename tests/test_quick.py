"""The quick selection: a check a method, a kernel file, a room and a topic of the theory.

``./run tests --quick`` runs it in a minute.  It repeats checks of other files, so the whole suite
leaves it out; what the selection has to cover is read from the registry and from the folders.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import test_attention
import test_bench
import test_cli
import test_clustering
import test_combiner
import test_decoding
import test_heads
import test_informer
import test_kernels
import test_methods
import test_metrics
import test_nearfar
import test_nearfar_coreset
import test_nearfar_levels
import test_operators
import test_partitions
import test_performer
import test_problem
import test_sampled
import test_sampling
import test_skeinformer
import test_sketches
import test_study
import test_thinformer
import test_vjp
import test_wildcat
from claim_cases import check_recorded, claims_of
from method_cases import MethodCase

import sketchattn as sa
from sketchattn import theory

ROOT = Path(sa.__file__).parent

Check = Callable[[], object]

# The file of sketchattn/kernels: a check whose answer is computed there.
KERNELS: dict[str, Check] = {
    "clustering": test_clustering.test_precisions_agree,
    "collisions": lambda: test_sampled.test_the_kept_keys_are_those_of_the_loops(2, "plain"),
    "gradients": lambda: test_vjp.test_gradients_are_those_of_loops(
        next(iter(test_vjp.CASES)), None
    ),
    "comparison": lambda: test_kernels.test_comparison_of_matrices_is_that_of_the_loops(
        test_kernels.NO_WINDOW[0], "positive"
    ),
    "decoding": lambda: test_decoding.test_small_states_are_their_causal_output({}, np.float32),
    "features": lambda: test_performer.test_the_formula_by_loops({}, True, True, np.float32),
    "halving": lambda: test_thinformer.test_buckets_are_halved_as_by_loops("simple", np.float32),
    "nearfar": lambda: test_nearfar.test_weights_are_those_of_the_loops(
        test_nearfar.FORMS[3], "causal"
    ),
    "nearfar_coreset": lambda: test_nearfar_coreset.test_weights_are_those_of_the_loops(
        test_nearfar_coreset.FORMS[1], "masked"
    ),
    "nearfar_levels": test_nearfar_levels.test_short_heads_have_no_coarse_cluster,
    "partitioned": test_combiner.test_products_are_those_of_the_formula_for_small_lengths,
    "pivoted": lambda: test_wildcat.test_pivots_are_those_of_the_loops(40, 3, 40, True),
    "probsparse": lambda: test_informer.test_a_given_draw_gives_what_the_formulas_give(
        "causal m", np.float32
    ),
    "sampled": lambda: test_skeinformer.test_the_estimator_is_its_loops(
        np.float32, "causal masked", "geometric", True
    ),
    "sketching": lambda: test_sketches.test_dense_form_is_the_definition("srht"),
    "softmax": lambda: test_kernels.test_product_over_several_tiles_is_that_of_the_loops(
        np.float32, "masked"
    ),
}
# Files of the folder that hold no kernel.
WITHOUT_KERNELS = {"__init__", "_jit", "_threads"}


def operators() -> None:
    for make in test_operators.OPERATORS.values():
        test_operators.test_products_are_those_of_the_dense_matrix(make(np.float32), np.float32)


def other(name: str) -> Any:
    """Return a file of tests, which skips where a package that it needs is missing."""
    return importlib.import_module(name)


# The room: a check of what it is for.  Kernels, methods and the theory have lists of their own.
ROOMS: dict[str, Check] = {
    "base": lambda: test_methods.test_unknown_methods_and_parameters_are_refused(
        *test_methods.UNKNOWN[0]
    ),
    "bench": test_bench.test_ratios_are_paired_and_targets_are_upper_bounds,
    "cli": test_cli.test_runs_as_a_module,
    "errors": lambda: test_metrics.test_every_field_is_its_formula("masked", "streaming"),
    "functional": lambda: test_attention.test_equals_the_loops(
        "gqa wide", "everything", np.float32
    ),
    "integrations": lambda: other("test_onnx").test_a_node_runs_alone(),
    "heads": test_heads.test_heads_are_a_sequence_of_problems,
    "operators": operators,
    "partitions": test_partitions.test_spans_have_their_slots,
    "problem": test_problem.test_kept_keys,
    "sampling": test_sampling.test_poisson_golden_moment,
    "sketches": lambda: test_sketches.test_as_many_rows_as_columns_are_exact("srht"),
    "testing": lambda: other(
        "test_check_attention"
    ).test_uniform_inputs_and_a_loose_tolerance_are_not_certified(),
    "studies": test_study.test_rows_are_error_reports_of_the_same_draw,
}

TOPICS = sorted({name.partition(".")[0] for name in theory.claims()})


@pytest.mark.quick
@pytest.mark.parametrize("name", list(sa.methods()))
def test_method(name: str) -> None:
    test_methods.check_contract(MethodCase(name), np.float32, "square", "strided")


@pytest.mark.quick
@pytest.mark.parametrize("name", KERNELS)
def test_kernel(name: str) -> None:
    KERNELS[name]()
    if not numba.config.DISABLE_JIT:  # type: ignore[attr-defined]  # set at run time
        assert ran(name)


def ran(name: str) -> list[str]:
    """Return the kernels of a file that this process has compiled or loaded."""
    module = importlib.import_module(f"sketchattn.kernels.{name}")
    return [key for key, x in vars(module).items() if getattr(x, "signatures", None)]


@pytest.mark.quick
@pytest.mark.parametrize("name", ROOMS)
def test_room(name: str) -> None:
    ROOMS[name]()


@pytest.mark.quick
@pytest.mark.statistical
@pytest.mark.parametrize("topic", TOPICS)
def test_topic(topic: str) -> None:
    """The record is that of the seed 0: no level, the same for every run."""
    claims = claims_of(topic)
    known = theory.instances()
    pairs = [
        (known[on].m * known[on].n, name, on) for name, c in claims.items() for on in c.instances
    ]
    _, name, on = min(pairs)
    check_recorded(claims, name, on, rng=0)


def stems(folder: Path) -> set[str]:
    """Return the modules and packages of a folder."""
    return {x.stem for x in folder.iterdir() if x.suffix == ".py" or (x / "__init__.py").exists()}


def test_nothing_is_forgotten_by_the_quick_selection() -> None:
    assert set(KERNELS) == stems(ROOT / "kernels") - WITHOUT_KERNELS
    others = {"kernels", "zoo", "theory"}
    assert set(ROOMS) | others == stems(ROOT) - {"__init__", "__main__"}
    assert set(TOPICS) == stems(ROOT / "theory") - {"__init__", "engine"}
    wanted: list[tuple[Callable[..., None], Collection[str]]] = [
        (test_method, sa.methods()),
        (test_kernel, KERNELS),
        (test_room, ROOMS),
        (test_topic, TOPICS),
    ]
    for test, names in wanted:
        marks = {mark.name: mark for mark in vars(test)["pytestmark"]}
        assert list(marks["parametrize"].args[1]) == list(names)
        assert "quick" in marks
