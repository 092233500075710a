"""Mamba-1's mixer with every named quantity hooked (Gu & Dao 2023, arXiv:2312.00752, section 3 and appendix D).

Shapes:
    mixer_in, mixer_out                          [batch, pos, d_model]
    in_x, gate, conv, x, delta, y, ssm_out, gated [batch, pos, d_inner]
    conv_taps                                    [batch, pos, d_inner, d_conv]
    dt                                           [batch, pos, dt_rank]
    B, C                                         [batch, pos, d_state]
    A_bar, B_bar, state                          [batch, pos, d_inner, d_state]
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ssminterp.models.hook_points import HookPoint, HookSpec
from ssminterp.models.mixers.scans import DiscretisedScan, SelectiveScan, Step
from ssminterp.models.mixers.state_hook import StateHookPoint
from ssminterp.models.mixers.state_matrices import known_state_matrix, state_matrix
from ssminterp.models.mixers.state_reads import ReadHookPoint, StateReads
from ssminterp.models.mixers.state_scan import scan_with_state_hooks
from ssminterp.models.tracing.requests import is_requested
from ssminterp_kernels.causal_conv import Activation, causal_conv, causal_conv_step

# Hugging Face's names of it.
SILU = ("silu", "swish")

D_INNER = ("batch", "pos", "d_inner")
D_STATE = ("batch", "pos", "d_state")
TRAJECTORY = ("batch", "pos", "d_inner", "d_state")

MIXER_HOOKS = (
    HookSpec("in_x", "mixer", D_INNER, "the half of in_proj that goes to the conv"),
    HookSpec("gate", "mixer", D_INNER, "the other half of in_proj, before its SiLU"),
    HookSpec("conv_taps", "mixer", (*D_INNER, "d_conv"), "the conv's terms, oldest token first", on_demand=True),
    HookSpec("conv", "mixer", D_INNER, "the conv's output with bias, before SiLU"),
    HookSpec("x", "mixer", D_INNER, "the SSM's input"),
    HookSpec("delta", "mixer", D_INNER, "step size Δ, after softplus"),
    HookSpec("B", "mixer", D_STATE, "what the token writes into the state"),
    HookSpec("C", "mixer", D_STATE, "what the token reads from the state"),
    HookSpec("A_bar", "mixer", TRAJECTORY, "decay exp(Δ A)", on_demand=True),
    HookSpec("B_bar", "mixer", TRAJECTORY, "write weights Δ B", on_demand=True),
    HookSpec("state", "mixer", TRAJECTORY, "hidden state h_t after the update at t", on_demand=True),
    HookSpec("y", "mixer", D_INNER, "the state read out through C"),
    HookSpec("ssm_out", "mixer", D_INNER, "y + D x"),
    HookSpec("gated", "mixer", D_INNER, "ssm_out · SiLU(gate)"),
)


# Hook points that are more than a place.
HOOK_POINTS: dict[str, type[HookPoint]] = {"state": StateHookPoint, "y": ReadHookPoint}


class HookedMambaMixer(nn.Module):
    """Takes over the submodules and parameters of a Hugging Face MambaMixer and computes the forward itself."""

    hook_specs = MIXER_HOOKS

    hook_in_x: HookPoint
    hook_gate: HookPoint
    hook_conv_taps: HookPoint
    hook_conv: HookPoint
    hook_x: HookPoint
    hook_delta: HookPoint
    hook_B: HookPoint
    hook_C: HookPoint
    hook_A_bar: HookPoint
    hook_B_bar: HookPoint
    hook_state: StateHookPoint
    hook_y: ReadHookPoint
    hook_ssm_out: HookPoint
    hook_gated: HookPoint

    def __init__(self, mixer: Any) -> None:
        super().__init__()
        self.layer_idx: int = mixer.layer_idx
        self.config = mixer.config
        self.act = mixer.act
        self.acts_as_silu: bool = mixer.config.hidden_act in SILU
        self.conv1d: nn.Conv1d = mixer.conv1d
        self.in_proj: nn.Linear = mixer.in_proj
        self.x_proj: nn.Linear = mixer.x_proj
        self.dt_proj: nn.Linear = mixer.dt_proj
        self.out_proj: nn.Linear = mixer.out_proj
        self.A_log: nn.Parameter = mixer.A_log
        self.D: nn.Parameter = mixer.D
        self.d_inner: int = mixer.intermediate_size
        self.d_state: int = mixer.ssm_state_size
        self.d_conv: int = mixer.conv_kernel_size
        self.dt_rank: int = mixer.time_step_rank
        for spec in self.hook_specs:
            point = HOOK_POINTS.get(spec.short, HookPoint)
            self.add_module(spec.attribute, point(spec, self.layer_idx))
            # Found at once: nn.Module looks for its modules last, thirty times a run.
            self.__dict__[spec.attribute] = self._modules[spec.attribute]
        self.training = mixer.training

    def forward(
        self,
        hidden_states: Float[Tensor, "batch pos d_model"],
        cache_params: Cache | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Float[Tensor, "batch pos d_model"]:
        """The mixer's output. A cache is read, if it holds a past, and updated, as Hugging Face's mixer does."""
        mask = None if attention_mask is None else attention_mask[:, :, None].to(hidden_states.dtype)
        masked = hidden_states if mask is None else hidden_states * mask
        in_x, gate = self.in_proj(masked).chunk(2, dim=-1)
        in_x, gate = self.hook_in_x(in_x), self.hook_gate(gate)
        initial_state = self._cached_state(cache_params)
        x = self._conv(in_x, cache_params)
        x = self.hook_x(x if mask is None else x * mask)
        gated, final_state = self._ssm(x, gate, initial_state)
        if cache_params is not None:
            cache_params.update_recurrent_state(final_state, self.layer_idx)
        return self.out_proj(self.hook_gated(gated).to(hidden_states.dtype))

    def _cached_state(self, cache: Cache | None) -> Float[Tensor, "batch d_inner d_state"] | None:
        if cache is None or not cache.has_previous_state(self.layer_idx):
            return None
        state = cache.layers[self.layer_idx].recurrent_states[0].float()
        # The cache is overwritten in place after the scan, which autograd must not see in what the scan saved.
        return state.clone() if torch.is_grad_enabled() else state

    def _conv(
        self, in_x: Float[Tensor, "batch pos d_inner"], cache: Cache | None
    ) -> Float[Tensor, "batch pos d_inner"]:
        """SiLU of the causal depthwise conv; earlier inputs come from the cache if it holds a past.

        The SiLU rides in the conv's kernel if no hook wants what lies between.
        """
        taps_wanted = self.hook_conv_taps.is_listened_to
        if taps_wanted or not is_plain_conv(self.conv1d) or self._keeps_whole_past(cache):
            return self.act(self.hook_conv(self._conv_by_module(in_x, cache, taps_wanted)))
        self.hook_conv_taps.pass_by()
        fused = self.acts_as_silu and not self.hook_conv.is_listened_to
        with weights_at_hand(self.conv1d):
            conv = self._fused_conv(in_x, cache, "silu" if fused else None)
        if fused:
            self.hook_conv.pass_by()
            return conv
        return self.act(self.hook_conv(conv))

    def _keeps_whole_past(self, cache: Cache | None) -> bool:
        """Whether the cache keeps more than the conv's window, to take tokens back."""
        return cache is not None and getattr(cache.layers[self.layer_idx], "record_past", False)

    def _fused_conv(
        self, in_x: Float[Tensor, "batch pos d_inner"], cache: Cache | None, activation: Activation
    ) -> Float[Tensor, "batch pos d_inner"]:
        """The conv and its activation in one kernel; the cache goes on."""
        conv1d = self.conv1d
        weight, bias = conv1d.weight[:, 0], conv1d.bias
        window = None
        if cache is not None and cache.has_previous_state(self.layer_idx):
            window = cache.layers[self.layer_idx].conv_states[0]
            if in_x.shape[1] == 1 and not torch.is_grad_enabled():
                y, _ = causal_conv_step(in_x[:, 0], window, weight, bias, activation=activation, in_place=True)
                return y[:, None]
            # The cache is overwritten in place below, which autograd must not see in what the conv saved.
            window = window.clone() if torch.is_grad_enabled() else window
        y = causal_conv(in_x, weight, bias, activation=activation, window=window).y
        if cache is not None:
            latest = in_x[:, -self.d_conv :].transpose(1, 2)
            cache.update_conv_state(latest, self.layer_idx, conv_kernel_size=self.d_conv)
        return y

    def _conv_by_module(
        self, in_x: Float[Tensor, "batch pos d_inner"], cache: Cache | None, by_taps: bool
    ) -> Float[Tensor, "batch pos d_inner"]:
        """The conv before its activation, by calling conv1d or with its terms shown; the cache goes on."""
        length = in_x.shape[1]
        inputs = in_x.transpose(1, 2)
        if cache is not None:
            inputs = cache.update_conv_state(inputs, self.layer_idx, conv_kernel_size=self.d_conv)
        if by_taps:
            return self._conv_by_taps(inputs, length)
        self.hook_conv_taps.pass_by()
        conv = self.conv1d(inputs)[..., : inputs.shape[-1]]
        return conv[..., -length:].transpose(1, 2)

    def _conv_by_taps(self, inputs: Float[Tensor, "batch d_inner time"], length: int) -> Tensor:
        """The conv with its terms shown: tap j of position t is the term of in_x at t - (d_conv - 1 - j)."""
        windows = F.pad(inputs, (self.d_conv - 1, 0)).unfold(-1, self.d_conv, 1)[:, :, -length:]
        with weights_at_hand(self.conv1d):
            taps = windows.transpose(1, 2) * self.conv1d.weight[:, 0]
            conv = self.hook_conv_taps(taps).sum(-1)
            return conv if self.conv1d.bias is None else conv + self.conv1d.bias

    def _ssm(
        self,
        x: Float[Tensor, "batch pos d_inner"],
        gate: Float[Tensor, "batch pos d_inner"],
        initial_state: Tensor | None,
    ) -> tuple[Float[Tensor, "batch pos d_inner"], Float[Tensor, "batch d_inner d_state"]]:
        """SiLU(gate) · (scan + D x), and the final state."""
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        dt, B, C = self.normalise(dt, B, C)
        step = self._step(dt)
        B, C = self.hook_B(B), self.hook_C(C)
        if self.hook_A_bar.is_listened_to or self.hook_B_bar.is_listened_to:
            scan: SelectiveScan | DiscretisedScan = self._discretised_scan(x, step.size(), B, C)
            fused = False
        else:
            self.hook_A_bar.pass_by()
            self.hook_B_bar.pass_by()
            # D and the gate ride in the scan's kernel if no hook wants what lies between. What a trace that waits for
            # states asks for next is not known yet.
            fused = not (self.hook_y.is_listened_to or self.hook_ssm_out.is_listened_to or self.hook_state.is_traced)
            # A state that is only passed on to the next token is overwritten where it lies.
            in_place = fused and not torch.is_grad_enabled() and not self.hook_state.is_listened_to
            known = known_state_matrix(self)
            A = self.A() if known is None else known
            scan = SelectiveScan(x, step, A, B, C, self.D if fused else None, gate if fused else None, in_place)
        y, final_state = scan_with_state_hooks(scan, self.hook_state, x, self.d_state, initial_state)
        for watch in self.hook_state.watchers:
            y = watch(self.hook_state, scan, y)
        if fused:
            self.hook_y.pass_by()
            self.hook_ssm_out.pass_by()
            return y, final_state
        with self.hook_y.reading(StateReads(scan, self.hook_state, x, y, self.d_state, initial_state)):
            y = self.hook_y(y)
        return self.hook_ssm_out(y + self.D.float() * x) * F.silu(gate), final_state

    def normalise(self, dt: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What stands between x_proj and the scan; nothing in Mamba-1 itself."""
        return dt, B, C

    def _step(self, dt: Float[Tensor, "batch pos dt_rank"]) -> Step:
        """Δ; or, when nothing listens to it, its pre-activation with the bias and softplus left to the scan."""
        dt_proj = self.dt_proj
        if type(dt_proj) is nn.Linear and dt_proj.__dict__.get("_hf_hook") is None:
            # The bias is added in float32, which is more exact than dt_proj itself under bfloat16 weights.
            delta, bias = F.linear(dt, dt_proj.weight), dt_proj.bias
        else:
            delta, bias = dt_proj(dt), None
        step = Step(delta, bias, softplus=True)
        if self.hook_delta.is_listened_to or self.hook_A_bar.is_listened_to or self.hook_B_bar.is_listened_to:
            return Step(self.hook_delta(step.size()), None, softplus=False)
        self.hook_delta.pass_by()
        return step

    def A(self) -> Float[Tensor, "d_inner d_state"]:
        """The state matrix's diagonal, -exp(A_log), in float32."""
        return state_matrix(self.A_log)

    def _discretised_scan(self, x: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> DiscretisedScan:
        """A scan over A_bar and B_bar as their hooks leave them."""
        A_bar = self.hook_A_bar(torch.exp(delta[..., None] * self.A()))
        B_bar = self.hook_B_bar(delta[..., None] * B[:, :, None].float())
        return DiscretisedScan(A_bar, B_bar * x[..., None].float(), C, x.dtype)


def is_plain_conv(module: nn.Module) -> bool:
    """Whether a conv need not be called to know what it does: it is no subclass or adapter, and nobody watches it."""
    watched = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or is_requested(module)
    return type(module) is nn.Conv1d and not watched


def weights_at_hand(module: nn.Module) -> AbstractContextManager[None]:
    """Brings back weights that accelerate keeps elsewhere until a module is called, for use without calling it."""
    accelerate_hook = module.__dict__.get("_hf_hook")
    return _AT_HAND if accelerate_hook is None else _brought_back(module, accelerate_hook)


_AT_HAND = nullcontext()


@contextmanager
def _brought_back(module: nn.Module, accelerate_hook: Any) -> Iterator[None]:
    accelerate_hook.pre_forward(module)
    try:
        yield
    finally:
        accelerate_hook.post_forward(module, ())


class HookedFalconMambaMixer(HookedMambaMixer):
    """Falcon-Mamba's mixer: weightless RMS norms on dt, B and C (Zuo et al. 2024, arXiv:2410.05355)."""

    def __init__(self, mixer: Any) -> None:
        super().__init__(mixer)
        self.dt_layernorm = mixer.dt_layernorm
        self.b_layernorm = mixer.b_layernorm
        self.c_layernorm = mixer.c_layernorm

    def normalise(self, dt: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.dt_layernorm(dt), self.b_layernorm(B), self.c_layernorm(C)
