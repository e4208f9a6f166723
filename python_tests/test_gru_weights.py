# SPDX-License-Identifier: Apache-2.0
"""Weights from and to other libraries: torch.nn.GRU, and the layouts of dien_ops.gru_weights.

The expected numbers were printed by the libraries' own cells, in the versions named at each, for the weights, inputs and
scores of a formula: dien_ops has to turn those weights into the same states.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import dien_ops
from dien_ops import gru_weights
from helpers import assert_close, random_state

D = torch.float64
IN, H, B, T = 3, 2, 2, 3


def sine(phase: float, *shape: int) -> np.ndarray:
    """sin(0.7 i + phase) over the elements i in memory order."""
    return np.sin(0.7 * np.arange(math.prod(shape)) + phase).reshape(shape)


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """The input and the scores."""
    return torch.tensor(sine(0.5, B, T, IN)), torch.tensor(0.5 + 0.5 * sine(1.5, B, T))


SHAPES = {
    "tensorflow": {
        "gates/kernel": (IN + H, 2 * H), "gates/bias": (2 * H,), "candidate/kernel": (IN + H, H), "candidate/bias": (H,),
    },
    "deepctr_torch": {"weight_ih": (3 * H, IN), "weight_hh": (3 * H, H), "bias_ih": (3 * H,), "bias_hh": (3 * H,)},
    "fuxictr": {"x2h.weight": (3 * H, IN), "x2h.bias": (3 * H,), "h2h.weight": (3 * H, H), "h2h.bias": (3 * H,)},
    "recbole": {"weight_ih": (3 * H, IN), "weight_hh": (3 * H, H), "bias_ih": (3 * H,), "bias_hh": (3 * H,)},
    "onednn": {"weights_layer": (1, 1, IN, 3, H), "weights_iter": (1, 1, H, 3, H), "bias": (1, 1, 3, H)},
    "onednn_lbr": {"weights_layer": (1, 1, IN, 3, H), "weights_iter": (1, 1, H, 3, H), "bias": (1, 1, 4, H)},
    "openvino": {"W": (3 * H, IN), "R": (3 * H, H), "B": (3 * H,)},
}  # fmt: skip
LIBRARIES = list(SHAPES)
WITHOUT_BIASES = ["deepctr_torch", "fuxictr", "recbole", "onednn", "onednn_lbr"]


def weights(library: str, cell: type = dien_ops.AUGRU) -> dict[str, np.ndarray]:
    """Each tensor of the library's cell has its place in the library's order as phase."""
    arrays = {name: sine(phase, *shape) for phase, (name, shape) in enumerate(SHAPES[library].items())}
    if library == "deepctr_torch" and cell is dien_ops.AUGRU:
        arrays["bias_ih"] = arrays["bias_hh"]  # one tensor under two names, in the cell and in what it saves
    return arrays


# Hidden states [B, T, H], row by row. The authors' cells are those that DeepCTR carries, run by its own file.
EXPECTED = {
    # VecAttGRUCell, QAAttGRUCell of DeepCTR 0.9.4 and GRUCell over the scaled input, TensorFlow 2.21.0
    ("tensorflow", dien_ops.AUGRU): [
        -0.5392486, -0.9412437, 0.5021848, -0.5789640, -0.4588482, -0.3567798,
        -0.2520637, -0.5225500, 0.0731096, -0.3033156, -0.2127156, -0.3384196,
    ],
    ("tensorflow", dien_ops.AGRU): [
        -0.5390611, -0.9407912, 0.4733848, -0.5990837, -0.2517977, -0.4495986,
        -0.1469807, -0.2623966, -0.1057615, -0.2469037, -0.1140777, -0.2498107,
    ],
    ("tensorflow", dien_ops.AIGRU): [
        -0.1495905, -0.3612722, 0.1236994, -0.1997560, -0.0597157, -0.3061504,
        -0.0196851, -0.3222010, -0.0279637, -0.4829796, -0.0965901, -0.6083195,
    ],
    # AUGRUCell, AGRUCell of DeepCTR-Torch 0.3.0
    ("deepctr_torch", dien_ops.AUGRU): [
        -0.0098310, -0.3945457, -0.0115054, -0.3454681, -0.3262457, -0.2791592,
        -0.0026272, -0.1102705, -0.0025831, -0.1087749, -0.0118423, -0.1070925,
    ],
    ("deepctr_torch", dien_ops.AGRU): [
        -0.7876489, -0.9854244, -0.5774413, -0.8308045, -0.8293707, 0.1245091,
        -0.2180580, -0.2751266, -0.2335269, -0.2863976, -0.2489381, -0.2650522,
    ],
    # AUGRUCell, AGRUCell of FuxiCTR 2.3.10 (model_zoo/LongCTR/DIEN)
    ("fuxictr", dien_ops.AUGRU): [
        -0.2671440, -0.6952796, -0.4178171, -0.6610640, -0.5650081, -0.2400804,
        -0.0704825, -0.1950519, -0.0757607, -0.2093124, -0.0858175, -0.2022015,
    ],
    ("fuxictr", dien_ops.AGRU): [
        -0.2887339, -0.9906898, -0.7536480, -0.6823211, -0.9047460, 0.1459128,
        -0.0761881, -0.2765588, -0.0887017, -0.2913239, -0.1070409, -0.2718235,
    ],
    # AUGRUCell, AGRUCell of RecBole 1.2.1
    ("recbole", dien_ops.AUGRU): [
        -0.0327384, -0.4463891, -0.2195860, -0.4536724, -0.5766871, -0.3710043,
        -0.0089329, -0.1245387, -0.0158262, -0.1253704, -0.0288661, -0.1237693,
    ],
    ("recbole", dien_ops.AGRU): [
        -0.7876489, -0.9854244, -0.5774413, -0.8308045, -0.8293707, 0.1245091,
        -0.2180580, -0.2751266, -0.2335269, -0.2863976, -0.2489381, -0.2650522,
    ],
    # augru_forward, gru_forward over the scaled input, and their lbr forms, of oneDNN 3.13.2 in float32
    ("onednn", dien_ops.AUGRU): [
        -0.8169656, -0.4908780, -0.2005908, -0.3352904, -0.7021536, -0.6578421,
        -0.3965811, -0.3011012, -0.3103091, -0.3561872, -0.4353052, -0.5248590,
    ],
    ("onednn", dien_ops.AIGRU): [
        -0.2353857, -0.2306044, -0.2546916, -0.3265535, -0.3900191, -0.4792756,
        -0.2233999, -0.2394096, -0.3744094, -0.3826242, -0.4852658, -0.4661846,
    ],
    ("onednn_lbr", dien_ops.AUGRU): [
        -0.8257840, -0.3847495, -0.1966913, -0.0463972, -0.7111233, -0.5616465,
        -0.4010262, -0.2343859, -0.3216951, -0.2002780, -0.4590128, -0.4320827,
    ],
    ("onednn_lbr", dien_ops.AIGRU): [
        -0.2379285, -0.1807523, -0.2705608, -0.2009158, -0.4172494, -0.3905223,
        -0.2271643, -0.1896688, -0.3873233, -0.3104340, -0.5054644, -0.3894830,
    ],
    # AUGRUSequence of OpenVINO 2026.4.1 in float32, on the CPU plugin, out of its own fusion of the cell's graph
    ("openvino", dien_ops.AUGRU): [
        -0.5614094, -0.9886960, -0.6192883, -0.8350206, -0.9509705, 0.1676948,
        -0.1853178, -0.4914796, -0.3503833, -0.5240023, -0.7544792, 0.2433118,
    ],
}  # fmt: skip
GOLDEN = pytest.mark.parametrize(
    ("library", "cell"), EXPECTED, ids=[f"{library}-{cell.__name__}" for library, cell in EXPECTED]
)


def states(library: str, cell: type) -> torch.Tensor:
    return torch.tensor(EXPECTED[library, cell], dtype=D).view(B, T, H)


def random_augru(library: str, **options) -> dien_ops.AUGRU:
    """With the gate and the place of the reset gate that the library has."""
    return dien_ops.AUGRU(IN, H, batch_first=True, dtype=D, **gru_weights.LAYOUTS[library].augru, **options)


# ---------------------------------------------------------------------------------------------------- other libraries


@GOLDEN
def test_a_cell_gives_the_librarys_states_with_its_weights(library, cell):
    module = cell.from_library(library, weights(library, cell), batch_first=True)
    output, h_n = module(*inputs())
    assert_close([output, h_n[0]], [states(library, cell), states(library, cell)[:, -1]], tolerance=2e-7)


@GOLDEN
def test_tensors_and_arrays_are_converted_alike_in_their_own_dtype(library, cell):
    arrays = {name: array.astype(np.float32) for name, array in weights(library, cell).items()}
    tensors = {name: nn.Parameter(torch.tensor(array)) for name, array in arrays.items()}
    from_arrays, from_tensors = cell.from_library(library, arrays), cell.from_library(library, tensors)
    for a, b in zip(from_arrays.parameters(), from_tensors.parameters(), strict=True):
        assert a.dtype == torch.float32 and a.requires_grad and b.is_leaf and torch.equal(a, b)


def test_a_gru_that_resets_before_the_product_runs_as_a_function():
    state = gru_weights.from_library("tensorflow", weights("tensorflow"))
    x, scores = inputs()
    output, _ = dien_ops.functional.gru(scores[..., None] * x, *state.values(), batch_first=True, reset_after=False)
    assert_close([output], [states("tensorflow", dien_ops.AIGRU)], tolerance=2e-7)


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_library_decides_gate_and_reset(library):
    cell = dien_ops.AUGRU.from_library(library, weights(library))
    assert cell.gate == ("paper" if library in ("deepctr_torch", "fuxictr", "recbole") else "authors")
    assert cell.reset_after == (library not in ("tensorflow", "onednn", "openvino"))
    assert (cell.input_size, cell.hidden_size, cell.bias, cell.batch_first) == (IN, H, True, False)


@GOLDEN
def test_weights_go_back_as_they_came(library, cell):
    came = weights(library, cell)
    back = cell.from_library(library, came).to_library(library)
    assert set(back) == set(came)
    for name, array in came.items():
        assert torch.equal(back[name], torch.tensor(array)), name
        assert back[name].is_contiguous() and not back[name].requires_grad, name


@pytest.mark.parametrize("library", [name for name in LIBRARIES if name != "deepctr_torch"])
def test_a_cell_with_both_biases_survives_the_way_through_a_library(library):
    cell = random_augru(library)
    back = dien_ops.AUGRU.from_library(library, cell.to_library(library), batch_first=True)
    assert_close(back(*inputs()), cell(*inputs()))


def test_weights_that_went_to_a_library_are_copies():
    cell = random_augru("recbole")
    for tensor in cell.to_library("recbole").values():
        tensor.zero_()
    assert all(parameter.abs().min() > 0 for parameter in cell.parameters())


@pytest.mark.parametrize("library", WITHOUT_BIASES)
def test_a_layer_without_biases_stays_without(library):
    came = {name: array for name, array in weights(library).items() if "bias" not in name}
    cell = dien_ops.AUGRU.from_library(library, came, batch_first=True)
    assert not cell.bias and set(cell.to_library(library)) == set(came)
    zeros = {name: np.zeros(shape) for name, shape in SHAPES[library].items()}
    with_zeros = dien_ops.AUGRU.from_library(library, zeros | came, batch_first=True)
    assert_close(cell(*inputs()), with_zeros(*inputs()))


@pytest.mark.parametrize("library", ["tensorflow", "openvino"])
def test_a_layer_without_biases_gets_zeros_where_the_library_always_has_them(library):
    cell = random_augru(library, bias=False)
    back = dien_ops.AUGRU.from_library(library, cell.to_library(library), batch_first=True)
    assert back.bias
    assert_close(back(*inputs()), cell(*inputs()))


def test_different_biases_do_not_fit_into_deepctr_torchs_augrucell():
    with pytest.raises(ValueError, match=r"has one tensor for both biases.*bias_ih and bias_hh differ"):
        random_augru("deepctr_torch").to_library("deepctr_torch")


@pytest.mark.parametrize(
    ("cell", "library", "message"),
    [
        (dien_ops.AUGRU(IN, H), "tensorflow", "tensorflow computes reset_after=False, this AUGRU has reset_after=True"),
        (dien_ops.AUGRU(IN, H), "onednn_lbr", "onednn_lbr computes gate='authors', this AUGRU has gate='paper'"),
        (dien_ops.AUGRU(IN, H, gate="authors"), "recbole", "recbole computes gate='paper', this AUGRU has gate='auth"),
        (dien_ops.AGRU(IN, H, reset_after=False), "fuxictr", "fuxictr computes reset_after=True, this AGRU has reset"),
    ],
)
def test_another_function_is_refused_on_the_way_back(cell, library, message):
    with pytest.raises(ValueError, match=message):
        cell.to_library(library)


def test_a_prefix_picks_one_cell_out_of_a_checkpoint():
    arrays = weights("tensorflow")
    checkpoint = {f"gru2/{name}": array for name, array in arrays.items()}
    checkpoint |= {"gru2/gates/kernel/Adam": np.zeros((IN + H, 2 * H)), "gru1/gru_cell/gates/kernel": np.zeros(1)}
    cell = dien_ops.AUGRU.from_library("tensorflow", checkpoint, prefix="gru2/")
    plain = dien_ops.AUGRU.from_library("tensorflow", arrays)
    assert all(torch.equal(a, b) for a, b in zip(cell.parameters(), plain.parameters(), strict=True))


def test_variables_may_have_the_names_that_tensorflow_gives_them():
    arrays = weights("tensorflow")
    cell = dien_ops.AUGRU.from_library("tensorflow", {f"gru2/{k}:0": v for k, v in arrays.items()}, prefix="gru2/")
    plain = dien_ops.AUGRU.from_library("tensorflow", arrays)
    assert all(torch.equal(a, b) for a, b in zip(cell.parameters(), plain.parameters(), strict=True))


def test_conversion_draws_no_random_numbers():
    theirs = nn.GRU(IN, H)
    before = random_state()
    dien_ops.AUGRU.from_library("recbole", weights("recbole"))
    dien_ops.AUGRU.from_torch(theirs)
    dien_ops.GRU.from_torch(theirs).to_torch()
    assert torch.equal(random_state(), before)


# ------------------------------------------------------------------------------------------------------------- errors


def without(library: str, name: str) -> dict[str, np.ndarray]:
    return {key: array for key, array in weights(library).items() if key != name}


@pytest.mark.parametrize(
    ("library", "given", "error", "message"),
    [
        ("keras", {}, ValueError, "library must be one of 'tensorflow', 'deepctr_torch', .*'openvino', got 'keras'"),
        ("recbole", nn.GRU(IN, H), TypeError, r"weights must be a mapping of names to tensors .*, got GRU"),
        ("recbole", {}, ValueError, "weights must hold weight_ih, weight_hh and, if it has biases, bias_ih, bias_hh,"),
        ("tensorflow", without("tensorflow", "gates/bias"), ValueError, "gates/bias, .* got candidate/bias, candidate"),
        ("recbole", without("recbole", "bias_hh"), ValueError, "got bias_ih, weight_hh, weight_ih"),
        ("openvino", weights("openvino") | {"P": np.zeros(1)}, ValueError, "weights must hold W, R, B, got B, P, R, W"),
        ("recbole", dict.fromkeys("abcdefghij"), ValueError, "got a, b, c, d, e, f, g, h and 2 more"),
        ("openvino", weights("openvino") | {"B": [0.0] * 6}, TypeError, "B must be a Tensor or a NumPy array, got li"),
        ("openvino", weights("openvino") | {"B": np.zeros(6, int)}, ValueError, "B must be of a floating.*, got int64"),
        ("openvino", weights("openvino") | {"B": np.zeros(6, np.float32)}, ValueError, "B must have the dtype of W"),
        ("openvino", weights("openvino") | {"W": np.zeros((1, 6, IN))}, ValueError, r"W must be 2-D, got 3-D of shape"),
        ("openvino", weights("openvino") | {"W": np.zeros((IN, 6))}, RuntimeError,
         r"W must have shape \[6, 6\] \[3H, I\], got \[3, 6\]"),
        ("tensorflow", weights("tensorflow") | {"gates/bias": np.zeros(6)}, RuntimeError,
         r"gates/bias must have shape \[4\] \[2H\], got \[6\]"),
        ("tensorflow", weights("tensorflow") | {"candidate/kernel": np.zeros((H, IN + H))}, RuntimeError,
         r"candidate/kernel must have shape \[5, 2\] \[I\+H, H\], got \[2, 5\]"),
        ("onednn", weights("onednn") | {"bias": np.zeros((1, 1, 4, H))}, RuntimeError,
         r"bias must have shape \[1, 1, 3, 2\] \[1, 1, 3, H\], got \[1, 1, 4, 2\]"),
    ],
)  # fmt: skip
def test_bad_weights_are_named(library, given, error, message):
    with pytest.raises(error, match=message):
        dien_ops.AUGRU.from_library(library, given)


def test_a_prefix_that_leads_nowhere_is_named():
    with pytest.raises(ValueError, match=r"weights must hold W, R, B under the prefix 'rnn\.', got none"):
        dien_ops.AUGRU.from_library("openvino", weights("openvino"), prefix="rnn.")


def test_only_one_layer_goes_to_a_library():
    with pytest.raises(ValueError, match=r"weights must hold weight_ih_l0, weight_hh_l0 and, .*weight_ih_l1"):
        gru_weights.to_library("openvino", nn.GRU(IN, H, num_layers=2).state_dict())
    with pytest.raises(ValueError, match="library must be one of"):
        dien_ops.AUGRU(IN, H).to_library("keras")


# -------------------------------------------------------------------------------------------------------- torch.nn.GRU

OPTIONS = {"num_layers": 2, "bias": False, "batch_first": True, "dropout": 0.25, "bidirectional": True}


@pytest.mark.parametrize("options", [{}, OPTIONS, {"num_layers": 3, "batch_first": True}], ids=["plain", "all", "some"])
@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_a_gru_from_torch_is_its_twin_and_goes_back(options, dtype):
    theirs = nn.GRU(IN, H, **options, dtype=dtype).eval()
    ours = dien_ops.GRU.from_torch(theirs)
    back = ours.to_torch()
    assert type(ours) is dien_ops.GRU and type(back) is nn.GRU
    for name in ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional"):
        assert getattr(ours, name) == getattr(theirs, name) == getattr(back, name), name
    x = inputs()[0].to(dtype)
    assert_close(ours(x), theirs(x), tolerance=torch.finfo(dtype).eps * 8)
    for a, b, c in zip(theirs.parameters(), ours.parameters(), back.parameters(), strict=True):
        assert a.dtype == b.dtype == c.dtype and torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("convert", [dien_ops.GRU.from_torch, dien_ops.AUGRU.from_torch])
@pytest.mark.parametrize("training", [True, False])
def test_mode_and_frozen_parameters_are_carried_over(training, convert):
    theirs = nn.GRU(IN, H).train(training)
    theirs.weight_hh_l0.requires_grad_(False)
    ours = convert(theirs)
    assert ours.training == training
    frozen = [name for name, parameter in ours.named_parameters() if not parameter.requires_grad]
    assert frozen == ["weight_hh_l0"]


def test_parameters_are_copied_and_not_shared():
    theirs = nn.GRU(IN, H)
    ours = dien_ops.GRU.from_torch(theirs)
    back = ours.to_torch()
    nn.init.zeros_(ours.weight_ih_l0)
    assert theirs.weight_ih_l0.abs().min() > 0 and back.weight_ih_l0.abs().min() > 0


def test_the_device_is_carried_over():
    ours = dien_ops.GRU.from_torch(nn.GRU(IN, H, device="meta"))
    assert {parameter.device.type for parameter in [*ours.parameters(), *ours.to_torch().parameters()]} == {"meta"}


@pytest.mark.parametrize(
    ("cell", "options", "score"),
    [(dien_ops.AUGRU, {}, 1.0), (dien_ops.AUGRU, {"gate": "authors"}, 0.0), (dien_ops.AIGRU, {}, 1.0)],
    ids=["paper_with_1", "authors_with_0", "input_with_1"],
)
def test_a_cell_from_torch_is_the_gru_where_the_scores_leave_it_alone(cell, options, score):
    theirs = nn.GRU(IN, H, batch_first=True, dtype=D)
    ours = cell.from_torch(theirs, **options)
    x, scores = inputs()
    assert_close(ours(x, torch.full_like(scores, score)), theirs(x))


@pytest.mark.parametrize("options", [{"num_layers": 2}, {"bidirectional": True}])
def test_a_cell_takes_one_layer_and_one_direction(options):
    with pytest.raises(ValueError, match="rnn must have one layer and one direction, got num_layers="):
        dien_ops.AUGRU.from_torch(nn.GRU(IN, H, **options))


@pytest.mark.parametrize("convert", [dien_ops.GRU.from_torch, dien_ops.AGRU.from_torch])
def test_from_torch_takes_nn_gru_itself(convert):
    class LayerNormGRU(nn.GRU):
        pass

    with pytest.raises(TypeError, match=r"rnn must be a torch.nn.GRU, got its subclass test_gru_weights.LayerNormGRU"):
        convert(LayerNormGRU(IN, H))
    with pytest.raises(TypeError, match=r"rnn must be a torch.nn.GRU, got torch.nn.modules.rnn.LSTM"):
        convert(nn.LSTM(IN, H))
    with pytest.raises(TypeError, match=r"rnn must be a torch.nn.GRU, got dien_ops.gru_modules.GRU"):
        convert(dien_ops.GRU(IN, H))


def weight_norm_of(module: nn.Module) -> nn.Module:
    return parametrizations.weight_norm(module, "weight_hh_l0")


def pruned(module: nn.Module) -> nn.Module:
    return prune.identity(module, "weight_hh_l0")


@pytest.mark.parametrize("change", [weight_norm_of, pruned])
@pytest.mark.parametrize(
    ("convert", "name"),
    [
        (lambda change: dien_ops.GRU.from_torch(change(nn.GRU(IN, H))), "rnn"),
        (lambda change: dien_ops.AUGRU.from_torch(change(nn.GRU(IN, H))), "rnn"),
        (lambda change: change(dien_ops.GRU(IN, H)).to_torch(), "the GRU"),
        (lambda change: change(dien_ops.AUGRU(IN, H)).to_library("fuxictr"), "the cell"),
    ],
    ids=["GRU.from_torch", "AUGRU.from_torch", "to_torch", "to_library"],
)
def test_parametrizations_must_be_removed_before_a_conversion(change, convert, name):
    with pytest.raises(ValueError, match=f"{name} must have plain parameters, got .*weight_hh_l0.*: remove the param"):
        convert(change)


@pytest.mark.parametrize("option", [{"batch_first": True}, {"dtype": D}, {"hidden_size": H}], ids=str)
def test_what_a_cell_copies_from_torch_is_no_option(option):
    with pytest.raises(TypeError, match=f"{next(iter(option))} must not be given: it is copied from rnn"):
        dien_ops.AUGRU.from_torch(nn.GRU(IN, H), **option)
