"""Compares one optimizer update of SmolLM2-135M with transformers and PyTorch: time and memory.

    python benchmarks/train_step.py [--repeats=5] [--rows=plain|shared|all]

Two cases, both float32, all parameters trained by AdamW:

    plain   8 rows of 400 tokens that share nothing, of which 100 are trained on
    shared  2 groups of 8 rows: 230 tokens shared by a group, then 75 of a row's own, 50 of them trained on;
            PyTorch computes every row in full

Both sides have the same random weights and tokens and maximize Σ A log π of trained tokens; their losses are compared
before anything is timed. PyTorch uses scaled-dot-product attention, and applies its output head to trained positions
only. Each side is a process of its own, and they take turns; times are of the second update on, memory is the process's
peak.
"""

from __future__ import annotations

import json
import sys
from types import ModuleType
from typing import Any

import _common as common
import jax
import jax.numpy as jnp
import numpy as np

from finemem_jax.config.sections import Optimizer
from finemem_jax.models import decoder, presets
from finemem_jax.rl import batching, grpo, learner

MODEL = presets.preset("smollm2_135m")
CASES = {"plain": (1, 8, 0, 400, 100), "shared": (2, 8, 230, 75, 50)}  # Groups, rows, shared and own tokens, trained.
LEARNING_RATE = 1e-5


def rows_of(case: str) -> tuple[np.ndarray, np.ndarray]:
    """Draws token ids [groups, rows, tokens], and one advantage per row [groups, rows]."""
    groups, rows, shared, own, _ = CASES[case]
    rng = np.random.default_rng(0)
    prefix = np.repeat(rng.integers(0, MODEL.vocab_size, (groups, 1, shared)), rows, axis=1)
    tokens = np.concatenate([prefix, rng.integers(0, MODEL.vocab_size, (groups, rows, own))], axis=2)
    return tokens.astype(np.int32), rng.normal(size=(groups, rows)).astype(np.float32)


class Ours:
    """Our learner, as training calls it."""

    def __init__(self, case: str, params: decoder.Params):
        """Packs the rows, and computes their log-probabilities."""
        groups, rows, shared, own, trained = CASES[case]
        tokens, advantages = rows_of(case)
        number = groups * rows
        ours = tokens.reshape(number, -1)
        self.batch = jax.device_put(
            batching.Batch(
                shared_prefix=np.zeros((1, 0), np.int32), shared_prefix_length=np.zeros(1, np.int32),
                group_prefix=tokens[:, 0, :shared], group_prefix_length=np.full(groups, shared, np.int32),
                suffix=ours[:, shared:], suffix_length=np.full(number, own, np.int32),
                response_start=np.full(number, own - trained, np.int32), response=ours[:, -trained:],
                rows=grpo.Rows(
                    token_mask=np.ones((number, trained), bool),
                    advantages=np.repeat(advantages.reshape(-1, 1), trained, 1),
                    old_log_probs=np.zeros((number, trained), np.float32),
                    weight=np.full(number, 1 / trained, np.float32), share=np.ones(number, np.float32),
                ),
            )
        )  # fmt: skip
        options = learner.LearnerOptions(MODEL, decoder.Compute(attention="blocked"), grpo.ObjectiveOptions())
        optimizer = learner.make_optimizer(Optimizer(learning_rate=LEARNING_RATE, warmup_steps=0))
        self.learner = learner.Learner({}, np.float32(1), options, optimizer)
        old = learner.score(params, self.batch, jnp.float32(1), options=options)
        self.mean = float((np.asarray(old) * np.asarray(self.batch.rows.advantages)).mean())
        self.batch = self.batch._replace(rows=self.batch.rows._replace(old_log_probs=old))
        self.state = learner.init(jax.tree.map(jnp.copy, params), optimizer)

    def __call__(self) -> None:
        """Makes one update."""
        self.state, _ = learner.update(self.learner, self.state, [self.batch])
        jax.block_until_ready(self.state.params)


class Theirs:
    """transformers' Llama with the same weights, trained in plain PyTorch."""

    def __init__(self, case: str, params: decoder.Params):
        """Builds the model, and computes the log-probabilities of the rows."""
        torch, transformers = (
            common.peer(package, "pip install torch transformers") for package in ("torch", "transformers")
        )

        *_, trained = CASES[case]
        tokens, advantages = rows_of(case)
        self.torch, self.trained = torch, trained
        self.tokens = torch.tensor(tokens.reshape(-1, tokens.shape[-1]), dtype=torch.long)
        self.advantages = torch.tensor(advantages.reshape(-1, 1))
        config = transformers.LlamaConfig(
            vocab_size=MODEL.vocab_size, hidden_size=MODEL.embed_dim, intermediate_size=MODEL.mlp_dim,
            num_hidden_layers=MODEL.num_layers, num_attention_heads=MODEL.num_heads,
            num_key_value_heads=MODEL.num_kv_heads, head_dim=MODEL.head_dim, rms_norm_eps=MODEL.norm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": MODEL.rope_theta}, tie_word_embeddings=True,
            attn_implementation="sdpa", use_cache=False,
        )  # fmt: skip
        with torch.device("meta"):
            self.model = transformers.LlamaModel(config)
        self.model.to_empty(device="cpu")
        self.model.rotary_emb = type(self.model.rotary_emb)(config)
        self.model.load_state_dict(_as_hugging_face(torch, params), strict=True)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), LEARNING_RATE, weight_decay=0.01)
        with torch.no_grad():
            self.mean = float((self._log_probs() * self.advantages).mean())

    def _log_probs(self) -> Any:
        torch = self.torch
        hidden = self.model(input_ids=self.tokens).last_hidden_state[:, -self.trained - 1 : -1]
        logits = hidden @ self.model.embed_tokens.weight.T
        return torch.log_softmax(logits, -1).gather(-1, self.tokens[:, -self.trained :, None])[..., 0]

    def __call__(self) -> None:
        """Makes one update."""
        self.optimizer.zero_grad(set_to_none=True)
        log_probs = self._log_probs()
        ratio = (log_probs - log_probs.detach()).exp()
        (-(ratio * self.advantages).mean()).backward()
        self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


def _as_hugging_face(torch: ModuleType, params: decoder.Params) -> dict[str, Any]:
    """Returns our weights under Hugging Face's names; its matrices are [out, in], ours [in, out]."""
    names = {
        "query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj", "out": "self_attn.o_proj",
        "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj", "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
    }  # fmt: skip

    def tensor(x: jax.Array) -> Any:
        return torch.tensor(np.ascontiguousarray(np.asarray(x).T))

    found = {"embed_tokens.weight": tensor(params["embedding"].T), "norm.weight": tensor(params["final_norm"])}
    for name, other in names.items():
        for i, leaf in enumerate(params["layers"][name]):
            found[f"layers.{i}.{other}.weight"] = tensor(leaf)
    return found


def work(side: str, case: str) -> None:
    """Works as a worker: makes one update for each line it reads."""
    update = {"ours": Ours, "theirs": Theirs}[side](case, decoder.init(MODEL, 0))
    print(json.dumps({"mean": update.mean}), flush=True)
    for _ in sys.stdin:
        seconds = common.seconds(update)
        print(json.dumps({"seconds": seconds, "peak_gigabytes": common.peak_gigabytes()}), flush=True)


def main() -> None:
    """Measures, and prints the claims."""
    parser = common.parser(__doc__, repeats=5)
    parser.add_argument("--rows", default="all", choices=["all", *CASES])
    parser.add_argument("--side", choices=["ours", "theirs"], help="be a worker (the benchmark starts its own)")
    arguments = parser.parse_args()
    if arguments.side:
        work(arguments.side, arguments.rows)
        return
    claims = []
    for case in CASES if arguments.rows == "all" else [arguments.rows]:
        ours, theirs = (common.Worker(__file__, f"--side={side}", f"--rows={case}") for side in ("ours", "theirs"))
        own_mean, mean = ours.read()["mean"], theirs.read()["mean"]
        assert abs(own_mean - mean) < 1e-4 * abs(mean), f"{own_mean} is not {mean}"
        ratios, memory = [], [0.0]
        for repeat in range(arguments.repeats + 1):
            own, peer = ours.do("update"), theirs.do("update")
            memory = [peer["peak_gigabytes"] / own["peak_gigabytes"]]
            print(f"{case}: ours {own}, PyTorch {peer}", flush=True)
            if repeat:
                ratios.append(peer["seconds"] / own["seconds"])
        ours.close()
        theirs.close()
        target = {"plain": 1.2, "shared": 3.0}[case]
        claims.append(common.claim(f"update, {case} rows, vs transformers + PyTorch", ratios, "x", target=target))
        claims.append(common.claim(f"peak memory of PyTorch / ours, {case} rows", memory, "x", target=1.0))
    common.report("train_step", claims, ["torch", "transformers", "flax", "optax"])


if __name__ == "__main__":
    main()
