"""AdamW's forms against torch's optimizer in float64, which can neither clip nor skip."""

import in_interpreter  # noqa: F401 - first
import pytest
import torch

from pangu.engines.megatron.fitting import select_backend
from pangu.ops import adamw as forms
from pangu.ops.adamw import Rule, State, Verdict

RULE = Rule(lr=3e-2, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.1)
CLIP = 0.25
SIZES = ((), (5,), (3, 16), (70_000,))  # the last is two programs' work
FORMS = [forms.adamw_reference, forms.adamw_torch, forms.adamw_fused, forms.adamw_triton]


def verdict(step, bad=0.0):
    return Verdict(torch.tensor([step]), torch.tensor([CLIP]), torch.tensor([bad]))


def fresh(dtype=torch.float32, moments=None, weights=None, sizes=SIZES):
    generator = torch.Generator().manual_seed(0)
    found = []
    for size in sizes:
        main = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
        zeros = [torch.zeros(size, dtype=moments or dtype) for _ in range(2)]
        followed = None if weights is None else main.to(weights)
        found.append(State(main, torch.empty_like(main), *zeros, followed))
    return found


def gradients(step, states):
    generator = torch.Generator().manual_seed(100 + step)
    for state in states:
        drawn = torch.randn(state.main.shape, generator=generator, dtype=torch.float64)
        state.gradient.copy_(drawn)


def updated(form, states, steps=3):
    for step in range(1, steps + 1):
        gradients(step, states)
        form(states, RULE, verdict(float(step)))
    return states


def expected(states, steps=3):
    """Main copies after as many steps of torch's optimizer, in float64."""
    mains = [state.main.double().clone().requires_grad_() for state in states]
    lr, *betas, epsilon, decay = RULE
    adam = torch.optim.AdamW(mains, lr, tuple(betas), epsilon, decay, foreach=False)
    for step in range(1, steps + 1):
        copies = fresh(torch.float64, sizes=[state.main.shape for state in states])
        gradients(step, copies)
        for main, copy in zip(mains, copies, strict=True):
            main.grad = CLIP * copy.gradient
        adam.step()
    return [main.detach() for main in mains]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_three_steps_are_those_of_torch(form, dtype):
    select_backend("cpu")
    states = fresh(dtype)
    wanted = expected(states)
    close = 2e-6 if dtype == torch.float32 else 1e-7  # clipping is told in float32
    for state, main in zip(updated(form, states), wanted, strict=True):
        torch.testing.assert_close(state.main.double(), main, rtol=close, atol=close)


@pytest.mark.parametrize("form", FORMS)
def test_weights_in_16_bits_follow_their_main_copies(form):
    for state in updated(form, fresh(weights=torch.bfloat16)):
        last_place = 2**-7 * state.main.abs()  # cut off in the interpreter, rounded elsewhere
        assert ((state.weights.float() - state.main).abs() <= last_place).all()
        if form is not forms.adamw_triton:
            assert torch.equal(state.weights, state.main.bfloat16())


@pytest.mark.parametrize("form", FORMS)
def test_moments_in_16_bits_stay_near(form):
    states = fresh(moments=torch.bfloat16)
    wanted = expected(states)
    for state, main in zip(updated(form, states), wanted, strict=True):
        assert state.exp_avg.dtype == state.exp_avg_sq.dtype == torch.bfloat16
        assert state.exp_avg.all()
        assert state.exp_avg_sq.all()
        off = (state.main.double() - main).abs() / RULE.lr  # of three steps, each about lr
        assert off.max() <= 0.06


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_a_bad_step_changes_nothing(form, moments):
    states = updated(form, fresh(moments=moments, weights=torch.bfloat16))
    before = [[tensor.clone() for tensor in state] for state in states]
    for state in states:
        state.gradient.fill_(torch.nan)
    form(states, RULE, Verdict(torch.tensor([3.0]), torch.tensor([torch.nan]), torch.ones(1)))
    for state, kept in zip(states, before, strict=True):
        for name, tensor in zip(State._fields, kept, strict=True):
            assert name == "gradient" or torch.equal(getattr(state, name), tensor), name
        if form is not forms.adamw_triton:
            assert torch.equal(state.weights, state.main.bfloat16())


def test_pieces_that_begin_anywhere_are_updated_alone():
    """As a sharded optimizer has them: in the middle of a buffer, off any unit."""
    whole = [torch.randn(64) for _ in range(4)] + [torch.zeros(64).bfloat16()]
    whole[3].abs_()
    before = [tensor.clone() for tensor in whole]
    pieces = State(*(tensor[3:40] for tensor in whole))
    copies = State(*(tensor[3:40].clone() for tensor in whole))
    forms.adamw_triton([pieces], RULE, verdict(2.0))
    forms.adamw_reference([copies], RULE, verdict(2.0))
    for ours, theirs in zip(pieces, copies, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=1e-7)
    for tensor, old in zip(whole, before, strict=True):
        assert torch.equal(tensor[:3], old[:3])
        assert torch.equal(tensor[40:], old[40:])
