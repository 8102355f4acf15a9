"""A forward pass of every layout, written out from weights and configuration alone.

Nothing of transformers is used but the names of weights and settings, so that sites read by hooks
can be compared with numbers that no module of transformers computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sae_experiments.models.hooks import Site

RMS = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3_text")
GEMMA = ("gemma", "gemma2", "gemma3_text")
ACTS: dict[str, Any] = {
    "gelu_new": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "gelu": nn.functional.gelu,
    "relu": nn.functional.relu,
    "silu": nn.functional.silu,
}


class Hand:
    """The weights of a model, and what its kind does with them."""

    def __init__(self, model: nn.Module) -> None:
        self.c: Any = model.config
        self.kind = self.c.model_type
        self.w = {k: v.double() for k, v in model.state_dict().items()}
        self.heads = self.c.num_attention_heads
        self.head_width = getattr(self.c, "head_dim", None) or self.c.hidden_size // self.heads

    # ------------------------------------------------------------------------------ parts

    def linear(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.w[f"{name}.weight"], self.w.get(f"{name}.bias")
        conv1d = self.kind == "gpt2" and name != "lm_head"
        y = x @ (weight if conv1d else weight.T)
        return y if bias is None else y + bias

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight = self.w[f"{name}.weight"]
        if self.kind in RMS:
            scaled = x / (x.square().mean(-1, keepdim=True) + self.c.rms_norm_eps).sqrt()
            return scaled * (weight + (self.kind in GEMMA))
        eps = next(
            (
                getattr(self.c, n)
                for n in ("layer_norm_epsilon", "layer_norm_eps")
                if n in dir(self.c)
            ),
            1e-5,
        )
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return scaled * weight + self.w[f"{name}.bias"]

    def split(self, x: Tensor) -> Tensor:
        """Heads of (B, T, H E), as (B, H, T, E)."""
        return x.unflatten(-1, (-1, self.head_width)).transpose(1, 2)

    def rope(self, i: int) -> tuple[float, float]:
        """Base, and share of a head that turns, in block i."""
        rope = dict(self.c.rope_parameters)
        if "rope_theta" not in rope:
            rope = dict(rope[self.c.layer_types[i]])
        return rope["rope_theta"], rope.get("partial_rotary_factor", 1.0)

    def turned(self, x: Tensor, i: int) -> Tensor:
        """Rotary positions: pairs (j, j + half) of the first dimensions turn."""
        theta, share = self.rope(i)
        n = int(self.head_width * share)
        angle = torch.arange(x.shape[-2]).double()[:, None] / theta ** (
            torch.arange(0, n, 2).double() / n
        )
        a, b, rest = x[..., : n // 2], x[..., n // 2 : n], x[..., n:]
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, i: int) -> Tensor:
        """Causal attention of heads (B, H, T, E) with grouped keys; side by side, (B, T, H E)."""
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = q @ k.transpose(-1, -2) * scale
        cap = getattr(self.c, "attn_logit_softcapping", None)
        scores = cap * torch.tanh(scores / cap) if cap else scores
        place = torch.arange(q.shape[2])
        back = place[:, None] - place
        seen = (back >= 0) & (back < self.window(i))
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)

    def window(self, i: int) -> int:
        """How many positions block i looks at, its own included."""
        if self.kind == "gpt_neo":
            return self.c.window_size if self.c.attention_layers[i] == "local" else 1 << 30
        kinds = getattr(self.c, "layer_types", None)
        size = getattr(self.c, "sliding_window", None)
        sliding = kinds[i] == "sliding_attention" if kinds else self.kind == "mistral"
        return size if size and sliding else 1 << 30

    # ------------------------------------------------------------------------------ attention

    def attention(self, x: Tensor, block: str, i: int) -> Tensor:
        """What attention writes, before any norm behind it; x is normed."""
        scale = self.head_width**-0.5
        if self.kind == "gpt2":
            parts = self.linear(x, f"{block}.attn.c_attn").chunk(3, -1)
            z = self.attend(*map(self.split, parts), scale, i)
            return self.linear(z, f"{block}.attn.c_proj")
        if self.kind == "gpt_neo":
            at = f"{block}.attn.attention"
            parts = [self.linear(x, f"{at}.{n}_proj") for n in "qkv"]
            return self.linear(self.attend(*map(self.split, parts), 1.0, i), f"{at}.out_proj")
        if self.kind == "gpt_neox":
            fused = self.linear(x, f"{block}.attention.query_key_value")
            q, k, v = fused.unflatten(-1, (self.heads, 3, -1)).transpose(1, 2).unbind(-2)
            z = self.attend(self.turned(q, i), self.turned(k, i), v, scale, i)
            return self.linear(z, f"{block}.attention.dense")
        at = f"{block}.self_attn"
        if self.kind == "phi3":
            n = self.heads * self.head_width
            kv = self.c.num_key_value_heads * self.head_width
            parts = self.linear(x, f"{at}.qkv_proj").split([n, kv, kv], -1)
        else:
            parts = [self.linear(x, f"{at}.{n}_proj") for n in "qkv"]
        q, k, v = map(self.split, parts)
        if self.kind in ("qwen3", "gemma3_text"):
            q, k = self.norm(q, f"{at}.q_norm"), self.norm(k, f"{at}.k_norm")
        if self.kind != "opt":
            q, k = self.turned(q, i), self.turned(k, i)
        if self.kind in ("gemma2", "gemma3_text"):
            scale = self.c.query_pre_attn_scalar**-0.5
        out = {"opt": "out_proj", "phi": "dense"}.get(self.kind, "o_proj")
        return self.linear(self.attend(q, k, v, scale, i), f"{at}.{out}")

    # ------------------------------------------------------------------------------ MLP

    def hidden(self, x: Tensor, block: str) -> Tensor:
        """Hidden activation of the MLP; x is normed."""
        names = ("activation_function", "hidden_activation", "hidden_act")
        act = ACTS[next(getattr(self.c, n) for n in names if getattr(self.c, n, None))]
        if self.kind == "phi3":
            gate, up = self.linear(x, f"{block}.mlp.gate_up_proj").chunk(2, -1)
            return act(gate) * up
        if self.kind in RMS:
            gate = act(self.linear(x, f"{block}.mlp.gate_proj"))
            return gate * self.linear(x, f"{block}.mlp.up_proj")
        up = {"gpt_neox": "mlp.dense_h_to_4h", "opt": "fc1", "phi": "mlp.fc1"}
        return act(self.linear(x, f"{block}.{up.get(self.kind, 'mlp.c_fc')}"))

    def down(self, x: Tensor, block: str) -> Tensor:
        names = {"gpt_neox": "mlp.dense_4h_to_h", "opt": "fc2", "phi": "mlp.fc2"}
        names |= dict.fromkeys(RMS, "mlp.down_proj")
        return self.linear(x, f"{block}.{names.get(self.kind, 'mlp.c_proj')}")

    # ------------------------------------------------------------------------------ the whole

    def forward(self, tokens: Tensor) -> tuple[dict[Site, Tensor], Tensor]:
        """Activations at every site, and logits."""
        list_of, norm_1, norm_2, last = {
            "gpt2": ("transformer.h", "ln_1", "ln_2", "transformer.ln_f"),
            "gpt_neo": ("transformer.h", "ln_1", "ln_2", "transformer.ln_f"),
            "gpt_neox": (
                "gpt_neox.layers",
                "input_layernorm",
                "post_attention_layernorm",
                "gpt_neox.final_layer_norm",
            ),
            "opt": (
                "model.decoder.layers",
                "self_attn_layer_norm",
                "final_layer_norm",
                "model.decoder.final_layer_norm",
            ),
            "phi": ("model.layers", "input_layernorm", "input_layernorm", "model.final_layernorm"),
        }.get(
            self.kind,
            ("model.layers", "input_layernorm", "post_attention_layernorm", "model.norm"),
        )
        posts = self.kind in ("gemma2", "gemma3_text")
        if posts:
            norm_2 = "pre_feedforward_layernorm"
        parallel = self.kind == "phi" or getattr(self.c, "use_parallel_residual", False)
        x = self.embedded(tokens)
        sites = {Site("resid", 0): x}
        for i in range(self.c.num_hidden_layers):
            block = f"{list_of}.{i}"
            attn = self.attention(self.norm(x, f"{block}.{norm_1}"), block, i)
            attn = self.norm(attn, f"{block}.post_attention_layernorm") if posts else attn
            read = self.norm(x if parallel else x + attn, f"{block}.{norm_2}")
            hidden = self.hidden(read, block)
            out = self.down(hidden, block)
            out = self.norm(out, f"{block}.post_feedforward_layernorm") if posts else out
            x = x + attn + out
            values = (x, attn, read, hidden, out)
            names = ("resid", "attn_out", "mlp_in", "mlp_act", "mlp_out")
            sites |= {Site(n, i + 1): v for n, v in zip(names, values, strict=True)}
        logits = self.linear(self.norm(x, last), "lm_head")
        cap = getattr(self.c, "final_logit_softcapping", None)
        return sites, cap * torch.tanh(logits / cap) if cap else logits

    def embedded(self, tokens: Tensor) -> Tensor:
        names = {"gpt2": "transformer.wte", "gpt_neo": "transformer.wte"}
        names |= {"gpt_neox": "gpt_neox.embed_in", "opt": "model.decoder.embed_tokens"}
        x = self.w[f"{names.get(self.kind, 'model.embed_tokens')}.weight"][tokens]
        length = tokens.shape[1]
        if self.kind in ("gpt2", "gpt_neo"):
            return x + self.w["transformer.wpe.weight"][:length]
        if self.kind == "opt":
            return x + self.w["model.decoder.embed_positions.weight"][2 : 2 + length]
        return x * self.c.hidden_size**0.5 if self.kind in GEMMA else x
