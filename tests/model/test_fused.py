"""Steps that are fused compute what transformers' own do, and keep less for the backward."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from p2p_llm_forge.model import fused as fusing
from p2p_llm_forge.model.fused import fuse, fuse_activations, is_gelu_by_tanh
from p2p_llm_forge.model.fused_steps import CausalAttention, RMSNorm, RotatedRMSNorm
from tests.model.families import FAMILIES, SIZES, model_of

BY_TANH = {
    "gpt2": FAMILIES["gpt2"][0],
    "bloom": {**SIZES, "n_layer": 2, "n_head": 2},
    "gpt_neo": {
        **{"hidden_size": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 64},
        **{"attention_types": [[["global"], 2]], "activation_function": "gelu_new"},
        **{"resid_dropout": 0.0, "embed_dropout": 0.0, "attention_dropout": 0.0},
    },
    "gptj": {**SIZES, "n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8},
    "phi": {**FAMILIES["llama"][0], "resid_pdrop": 0.0, "hidden_act": "gelu_fast"},
}
TOKENS = torch.arange(60).view(3, 20)


def gradients(lm):
    """The loss and the gradients of a model, as its own forward computes them, and their names."""
    loss = lm(TOKENS, labels=TOKENS).loss
    loss.backward()
    return loss, {name: weight.grad for name, weight in lm.named_parameters()}


@pytest.mark.parametrize("family", BY_TANH)
def test_a_fused_gelu_changes_neither_loss_nor_gradients(family):
    usual = model_of(family, **BY_TANH[family]).double()
    fused = copy.deepcopy(usual)
    fuse_activations(fused)
    found = [type(module) for module in fused.modules() if type(module) is nn.GELU]
    assert len(found) == 2  # one in each layer
    (expected, of_usual), (loss, of_fused) = gradients(usual), gradients(fused)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    assert list(of_fused) == list(of_usual)
    torch.testing.assert_close(of_fused, of_usual, rtol=1e-7, atol=1e-10)
    assert fused.state_dict().keys() == usual.state_dict().keys()


def test_less_is_kept_for_the_backward():
    def kept(lm):
        found: dict[int, int] = {}

        def pack(tensor):
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = lm(TOKENS, labels=TOKENS).loss
        return sum(found.values()), loss

    lm = model_of("gpt2", **FAMILIES["gpt2"][0])
    before, _ = kept(lm)
    fuse_activations(lm)
    after, _ = kept(lm)
    # Three tensors less of what the feed-forward has between its two products, 4 x 32 wide.
    per_layer = 3 * TOKENS.numel() * 4 * 32 * 4
    assert before - after == 2 * per_layer


class Halves(nn.Module):
    """A gate that is a GELU, of a name like those."""

    def forward(self, x):
        a, b = x.chunk(2, -1)
        return nn.functional.gelu(a, approximate="tanh") * b


class GeluOfTwo(nn.Module):
    def forward(self, x, y):
        return nn.functional.gelu(x, approximate="tanh") * y


@pytest.mark.parametrize(
    ("name", "is_fused"),
    [
        ("gelu_new", True),
        ("gelu_fast", True),
        ("gelu_python_tanh", True),
        ("gelu", False),
        ("gelu_10", False),
        ("gelu_python", False),
        ("quick_gelu", False),
        ("silu", False),
        ("relu2", False),
    ],
)
def test_only_that_approximation_is_replaced(name, is_fused):
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        pytest.skip(f"this transformers has no {name}")
    assert is_gelu_by_tanh(ACT2FN[name]) == is_fused


@pytest.mark.parametrize("module", [Halves(), GeluOfTwo(), nn.GELU("tanh"), nn.GELU()])
def test_others_of_such_names_stay(module):
    assert not is_gelu_by_tanh(module)


def own_rms_norm(x, weight, eps):
    """By its definition (arXiv 1910.07467), in x's precision."""
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def assert_same_gradients(found, expected, inputs):
    """And values: to a hundred-thousandth of the largest of each."""
    draw = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    of_found = [found, *torch.autograd.grad((found * draw).sum(), inputs)]
    of_expected = [expected, *torch.autograd.grad((expected * draw).sum(), inputs)]
    for one, other in zip(of_found, of_expected, strict=True):
        other = other.to(one.dtype)
        torch.testing.assert_close(
            one, other, rtol=0, atol=1e-5 * float(other.detach().abs().max())
        )


@pytest.mark.parametrize("size", [1e-4, 1, 300])
def test_a_norm_is_what_its_definition_says(size):
    torch.manual_seed(0)
    x = (size * torch.randn(2, 5, 16)).requires_grad_()
    weight = torch.randn(16, requires_grad=True)
    found = RMSNorm.apply(x, weight, 1e-5, torch.float32)
    expected = own_rms_norm(x.double(), weight.double(), 1e-5)
    assert_same_gradients(found, expected, [x, weight])


@pytest.mark.parametrize("blocks", [1, 2])
def test_a_rotated_norm_turns_pairs_by_their_angles(blocks):
    """As complex numbers: value i of the first half and of the second are one, which is turned."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 8, requires_grad=True)
    weight = torch.randn(8, requires_grad=True)
    angles = torch.randn(blocks, 5, 1, 4)
    rotation = tuple(torch.cat([one, one], -1) for one in (angles.cos(), angles.sin()))
    found = RotatedRMSNorm.apply(x, weight, rotation, 1e-6, torch.float32)
    normal = own_rms_norm(x.double(), weight.double(), 1e-6)
    pairs = torch.complex(normal[..., :4], normal[..., 4:])
    turned = pairs * torch.polar(torch.ones_like(angles), angles).to(pairs.dtype)
    assert_same_gradients(found, torch.cat([turned.real, turned.imag], -1), [x, weight])


@pytest.mark.parametrize("tokens", [1, 2, 17])
def test_attention_is_what_its_definition_says(tokens):
    torch.manual_seed(0)
    heads = [torch.randn(2, tokens, 3, 8).transpose(1, 2).requires_grad_() for _ in range(3)]
    found = CausalAttention.apply(*heads, 0.3)
    query, key, value = (one.double() for one in heads)
    scores = 0.3 * torch.einsum("bhqd,bhkd->bhqk", query, key)
    scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf)
    expected = torch.einsum("bhqk,bhkd->bhqd", scores.exp() / scores.exp().sum(-1, True), value)
    assert_same_gradients(found, expected, heads)


FUSED = {
    **{name: FAMILIES[name][0] for name in ("llama", "lfm2", "gpt2", "gpt_neox", "gemma2")},
    "qwen3": {**FAMILIES["llama"][0], "head_dim": 16},
    "qwen3 with fewer keys": {**FAMILIES["llama"][0], "head_dim": 16, "num_key_value_heads": 1},
    "qwen3 with a window": {
        **{**FAMILIES["llama"][0], "head_dim": 16, "use_sliding_window": True},
        **{"sliding_window": 4, "max_window_layers": 0},
    },
    "mistral": FAMILIES["llama"][0],
    "olmo2": FAMILIES["llama"][0],
    "gemma3_text": {**FAMILIES["llama"][0], "head_dim": 16},
    "bloom": BY_TANH["bloom"],
}


def two_of(family):
    torch.manual_seed(0)
    usual = model_of(family.split()[0], **FUSED[family])
    fused = copy.deepcopy(usual)
    fuse(fused)
    return usual, fused


@pytest.mark.parametrize("family", FUSED)
def test_a_fused_model_has_its_own_loss_and_gradients(family):
    usual, fused = two_of(family)
    (expected, of_usual), (loss, of_fused) = gradients(usual), gradients(fused)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(of_fused, of_usual, rtol=1e-3, atol=2e-6)
    assert fused.config.to_dict() == usual.config.to_dict()
    assert fused.state_dict().keys() == usual.state_dict().keys()


@pytest.mark.parametrize("family", ["lfm2", "qwen3", "llama"])
def test_in_double_precision_too(family):
    """Where transformers' own norms are in float32."""
    usual, fused = (one.double() for one in two_of(family))
    (expected, of_usual), (loss, of_fused) = gradients(usual), gradients(fused)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(of_fused, of_usual, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("family", FUSED)
def test_in_half_precision_it_is_as_far_from_float32_as_before(family):
    usual, fused = two_of(family)
    _, exact = gradients(copy.deepcopy(usual))
    missed = []
    for lm in (usual, fused):
        with torch.autocast("cpu", torch.bfloat16):
            _, found = gradients(lm)
        difference = sum(float((found[name] - exact[name]).square().sum()) for name in exact)
        missed.append((difference / sum(float(g.square().sum()) for g in exact.values())) ** 0.5)
    before, after = missed
    assert 0 < after < 1.2 * before


KINDS = ("norm", "self_attn")


def test_steps_are_fused_where_they_are_known():
    _, lfm2 = two_of("lfm2")
    own = [name for name, module in lfm2.named_modules() if "forward" in vars(module)]
    assert own == [name for name, _ in lfm2.named_modules() if name.endswith(KINDS)]


def test_a_norm_that_computes_otherwise_stays():
    """gemma multiplies by one more than the weight."""
    usual, fused = two_of("gemma2")
    for module in fused.modules():
        if hasattr(module, "eps"):
            module.variance_epsilon = module.eps
    fuse(fused)
    assert not any("forward" in vars(module) for module in fused.modules())
    torch.testing.assert_close(fused(TOKENS).logits, usual(TOKENS).logits)


class WithoutWeightRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.variance_epsilon = 1e-6

    def forward(self, x):
        return x / (x.square().mean(-1, keepdim=True) + self.variance_epsilon).sqrt()


class PairRMSNorm(WithoutWeightRMSNorm):
    """Returns what no norm does."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32))

    def forward(self, x):
        return {"normal": self.weight * super().forward(x)}


class GatedRMSNorm(WithoutWeightRMSNorm):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32))

    def forward(self, x, gate=None):
        return self.weight * super().forward(x if gate is None else x * gate)


@pytest.mark.parametrize("kind", [WithoutWeightRMSNorm, GatedRMSNorm, PairRMSNorm])
def test_norms_of_other_kinds_stay(kind):
    lm = model_of("llama", **FAMILIES["llama"][0])
    lm.model.norm = kind()
    fuse(lm)
    assert "forward" not in vars(lm.model.norm)
    assert "forward" in vars(lm.model.layers[0].input_layernorm)


@pytest.mark.parametrize("is_other", [False, True])
def test_attention_that_computes_otherwise_stays(is_other):
    """Also where its last layer is zero, as a new model's is."""
    lm = model_of("qwen3", **FUSED["qwen3"])
    attention = lm.model.layers[0].self_attn
    nn.init.zeros_(attention.o_proj.weight)
    usual = type(attention)

    def forward(self, *arguments, **others):
        output, weights = usual.forward(self, *arguments, **others)
        return (1.01 * output if is_other else output), weights

    attention.__class__ = type("Qwen3Attention", (usual,), {"forward": forward})
    fuse(lm)
    assert ("forward" in vars(attention)) == (not is_other)
    assert not attention.o_proj.weight.any()


@pytest.mark.parametrize("family", ["lfm2", "qwen3", "llama"])
def test_weights_in_half_precision_are_fused_too(family):
    torch.manual_seed(0)
    usual = model_of(family, **FUSED[family])
    with torch.no_grad():
        for weight in usual.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    usual = usual.bfloat16()
    fused = copy.deepcopy(usual)
    fuse(fused)
    kinds = KINDS[: 1 if family == "llama" else 2]
    names = {name for name, module in fused.named_modules() if "forward" in vars(module)}
    assert names == {name for name, module in fused.named_modules() if name.endswith(kinds)}
    found, expected = fused(TOKENS).logits, usual(TOKENS).logits
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_sparse_attention_stays_sparse():
    """It goes by the name of the attention, and shows only where tokens are more than it takes."""
    sizes = {**FAMILIES["llama"][0], "index_topk": 8, "index_n_heads": 2, "index_head_dim": 16}
    sizes |= {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
    sizes |= {"v_head_dim": 16, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
    sizes |= {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
    usual = model_of("deepseek_v32", **sizes).eval()
    fused = copy.deepcopy(usual)
    fuse(fused)
    assert usual.config._attn_implementation == fused.config._attn_implementation == "sdpa"
    torch.testing.assert_close(fused(TOKENS).logits, usual(TOKENS).logits)


@pytest.mark.parametrize("family", ["lfm2", "qwen3", "gpt2"])
def test_what_is_fused_generates_copies_and_saves_as_before(family, tmp_path):
    usual, fused = (one.eval() for one in two_of(family))
    prompt = {"inputs": TOKENS[:, :5], "max_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        assert torch.equal(fused.generate(**prompt), usual.generate(**prompt))
        other = copy.deepcopy(fused)  # which must not lead back to the first one's weights
        for weight in other.parameters():
            weight.zero_()
        assert not torch.equal(other(TOKENS).logits, fused(TOKENS).logits)
    for lm, name in ((usual, "usual"), (fused, "fused")):
        lm.save_pretrained(tmp_path / name)
    for one in sorted((tmp_path / "usual").iterdir()):
        assert one.read_bytes() == (tmp_path / "fused" / one.name).read_bytes(), one.name


@pytest.fixture
def calls(monkeypatch):
    """Of `CausalAttention`."""
    found, apply = [], CausalAttention.apply
    monkeypatch.setattr(CausalAttention, "apply", lambda *a: found.append(a) or apply(*a))
    return found


@pytest.mark.parametrize("tokens", [fusing.SHORT_BLOCK, fusing.SHORT_BLOCK + 1])
def test_attention_of_short_blocks_is_our_own(tokens, calls):
    """In half precision and in training, where torch's takes more time."""
    _, fused = two_of("gpt2")
    blocks = torch.zeros(1, tokens, dtype=torch.int64)
    fused(blocks)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            fused(blocks)
        assert not calls
        fused(blocks, attention_mask=torch.tensor([[0] + [1] * (tokens - 1)]))
        assert not calls
        fused(blocks).logits.sum().backward()
    assert len(calls) == 2 * (tokens <= fusing.SHORT_BLOCK)


@pytest.mark.parametrize(
    "asked",
    [
        {"dropout": 0.5},
        {"is_causal": False},
        {"position_bias": torch.zeros(1, 2, 9, 9)},
        {"attention_mask": torch.ones(9, 9, dtype=torch.bool)},
    ],
)
def test_attention_of_other_kinds_is_torchs(asked, calls):
    torch.manual_seed(0)
    module = nn.Module()  # causal, where it does not say otherwise
    heads = [torch.randn(1, 2, 9, 8, dtype=torch.bfloat16) for _ in range(3)]
    fusing.attend_in_short_blocks(module, *heads, **{"attention_mask": None, **asked})
    assert not calls
    fusing.attend_in_short_blocks(module, *heads, None)
    assert len(calls) == 1
    module.is_causal = False
    fusing.attend_in_short_blocks(module, *heads, None)
    assert len(calls) == 1


def test_attention_keeps_its_dropout_in_training(calls):
    sizes = {**FUSED["qwen3"], "attention_dropout": 0.5}
    lm = model_of("qwen3", **sizes)
    fuse(lm)
    with torch.autocast("cpu", torch.bfloat16):
        first, second = (lm(TOKENS).logits for _ in range(2))
        assert not torch.equal(first, second)
        lm.eval()
        assert torch.equal(lm(TOKENS).logits, lm(TOKENS).logits)
    assert len(calls) == 4  # of the two layers, in evaluation with a gradient


@pytest.mark.parametrize("offset", [0, 30])
@pytest.mark.parametrize("size", [0.5, 2, 4.5])
def test_attention_in_half_precision_is_about_as_exact_as_torchs(size, offset):
    """Also where scores are large, and where all of a token's are: by a bias of the keys, say."""
    torch.manual_seed(0)
    shape = (2, 2, 256, 64)
    query, key, value, grad = (torch.randn(shape) for _ in range(4))
    exact = [(size * query).double(), size * key.double() + offset * size**-1, value.double() + 3]
    missed = []
    halves = [one.bfloat16().requires_grad_() for one in exact]
    exact = [one.detach().double().requires_grad_() for one in halves]
    attend = nn.functional.scaled_dot_product_attention
    grad = grad.bfloat16()
    expected = attend(*exact, is_causal=True)
    expected = [expected, *torch.autograd.grad(expected, exact, grad.double())]
    for found in (attend(*halves, is_causal=True), CausalAttention.apply(*halves, 64**-0.5)):
        tensors = [found, *torch.autograd.grad(found, halves, grad)]
        pairs = zip(tensors, expected, strict=True)
        missed.append([((a.double() - b).norm() / b.norm()).item() for a, b in pairs])
    for torchs, ours in zip(*missed, strict=True):
        assert ours < 0.002 + 2 * torchs


def test_a_norm_before_linear_layers_gives_what_they_compute_in():
    _, fused = two_of("qwen3")
    layer = fused.model.layers[0]
    x = torch.randn(1, 3, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.input_layernorm(x).dtype == torch.bfloat16
        assert fused.model.norm(x).dtype == torch.float32
    assert layer.input_layernorm(x).dtype == torch.float32


def test_a_frozen_norm_has_no_gradient():
    x = torch.randn(2, 8, requires_grad=True)
    weight = torch.randn(8)
    RMSNorm.apply(x, weight, 1e-6, torch.float32).sum().backward()
    assert weight.grad is None and x.grad is not None
