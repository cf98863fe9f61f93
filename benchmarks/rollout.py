"""Measures a full rollout of SmolLM2-135M: what is computed, how full slots are, what each part of the sampler gains.

    python benchmarks/rollout.py [--repeats=3] [--streams=4] [--chunks=6] [--slots=16]

4 streams × 8 rollouts × 6 chunks with five questions each, manager and reader in one process, sampled at temperature
0.8 as `experiments/smollm2_135m.py` does. Then, on shorter streams, the same with one part of the sampler switched off
at a time:

    prefixes     every prompt is computed in full
    own pace     no rollout begins a chunk before all have written to the last one
    early leave  slots are given on only once all of them are done, or at their longest response

Seeds are those of the repeat, so that both sides of a ratio do the same work, token by token.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import _common as common

from experiments import smollm2_135m
from finemem_jax import build, input_pipeline
from finemem_jax import config as config_lib
from finemem_jax.rl import rollout
from finemem_jax.rl.method import rollout_options
from finemem_jax.runtime import workers
from finemem_jax.sampling import slots
from finemem_jax.sampling.engine import Engine
from finemem_jax.sampling.prefix_cache import PrefixCache
from finemem_jax.types import Request

PARTS = ("prefixes", "own pace", "early leave")


class Setting:
    """Rolls out streams of one size."""

    def __init__(self, streams: int, chunks: int, num_slots: int):
        """Builds manager, reader and streams, and compiles."""
        settings = smollm2_135m.get_config()
        settings.rollout.streams_per_step, settings.rollout.group_size = streams, 8
        settings.data.num_train = 16 * streams
        settings.data.chunks_per_stream, settings.data.questions_per_chunk = chunks, 5
        settings.sampler.num_slots = settings.reader.num_slots = num_slots
        config = config_lib.parse(settings)
        self.config, self.parts = config, build.build(config)
        self.source = input_pipeline.streams(config, "train", self.parts.environment)
        build.warm_up(config, self.parts, lambda line: print(line, flush=True))

    def run(self, repeat: int, policy: rollout.Policy | None = None) -> dict[str, float]:
        """Rolls out the streams of a repeat once; returns what it cost."""
        parts, count = self.parts, self.config.rollout.streams_per_step
        samplers = parts.manager, parts.answering.sampler()
        # Nothing is left of the last rollout; in training, the reader's part would be.
        for sampler in samplers:
            sampler.update(parts.params, repeat)
        assert isinstance(parts.answering.answer, workers.Memoized)
        parts.answering.answer._known.clear()
        streams = [self.source[repeat * count + i] for i in range(count)]
        options = rollout_options(self.config, evaluation=False)
        players = dataclasses.replace(parts.players, policy=policy or parts.manager)
        began = time.perf_counter()
        rollout.run(streams, options, players, (0, repeat))
        seconds = time.perf_counter() - began
        manager, reader = (sampler.take_stats() for sampler in samplers)
        return {
            "seconds": seconds,
            "tokens": manager.new_tokens + reader.new_tokens,
            "prefilled": (manager.prefilled_tokens + reader.prefilled_tokens)
            / (manager.prompt_tokens + reader.prompt_tokens),
            "prefilled_manager": manager.prefilled_tokens / manager.prompt_tokens,
            "prefilled_reader": reader.prefilled_tokens / max(reader.prompt_tokens, 1),
            "occupancy": (manager.slot_tokens + reader.slot_tokens) / (manager.slot_steps + reader.slot_steps),
            "occupancy_manager": manager.slot_tokens / manager.slot_steps,
            "host": 1 - (manager.device_seconds + reader.device_seconds) / seconds,
            "manager_seconds": manager.seconds,
            "reader_seconds": reader.seconds,
        }

    def in_step(self) -> rollout.Policy:
        """Wraps the manager as a function of many prompts: all are done before the next ones are asked for."""
        return workers.Batched(self.parts.manager.generate)


class _Never(dict):
    """A dict that finds nothing."""

    def __contains__(self, _: object) -> bool:
        return False


@contextmanager
def without_prefixes() -> Iterator[None]:
    """Makes samplers compute every prompt in full: no row begins with anything known, and prompts share nothing."""
    new_admission = slots._Shard.new_admission

    def forgetful(shard: slots._Shard) -> None:
        new_admission(shard)
        shard._by_prompt = _Never()

    with (
        mock.patch.object(PrefixCache, "match", lambda *_: (0, 0)),
        mock.patch.object(slots._Shard, "new_admission", forgetful),
        mock.patch.object(Request, "shared_prefix", property(lambda _: ())),
    ):
        yield


@contextmanager
def without_leaving(longest: int) -> Iterator[None]:
    """Makes a call to the device last until every slot is done."""
    decode, init = Engine.decode, Engine._decode

    def to_the_end(engine: Engine, *arguments: Any, allowed: Any = None) -> Any:
        prefix, cache, state, _ = arguments
        return decode(engine, prefix, cache, state, allowed=allowed)

    def long(engine: Engine, *arguments: Any, **rules: Any) -> Any:
        settings = dataclasses.replace(engine._settings, steps_per_call=longest)
        with mock.patch.object(engine, "_settings", settings):
            return init(engine, *arguments, **rules)

    with mock.patch.object(Engine, "decode", to_the_end), mock.patch.object(Engine, "_decode", long):
        yield


def pairs(own_side: Setting, other_side: Setting, part: str, *, repeats: int) -> list[float]:
    """Returns how many times as long a token takes with a part switched off; the first pair is warm-up.

    Args:
        own_side: As it is.
        other_side: Has samplers of its own: without prefixes, caches must be longer, and stay so.
        part: One of PARTS.
        repeats: How many pairs are counted.
    """
    longest = other_side.config.rollout.max_new_tokens
    switches: dict[str, Callable[[], Any]] = {
        "prefixes": without_prefixes,
        "early leave": lambda: without_leaving(longest),
    }
    switched_off = switches.get(part, nullcontext)
    ratios = []
    for repeat in range(repeats + 1):
        own = own_side.run(repeat)
        with switched_off():
            other = other_side.run(repeat, other_side.in_step() if part == "own pace" else None)
        # Both drew the same; but for rounding, which now and then turns a draw.
        assert abs(own["tokens"] - other["tokens"]) < 0.2 * own["tokens"]
        ratios.append((other["seconds"] / other["tokens"]) / (own["seconds"] / own["tokens"]))
        print(f"with {own}\nwithout {other}", flush=True)
    return ratios[1:]


def main() -> None:
    """Measures, and prints the claims."""
    parser = common.parser(__doc__, repeats=3)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--chunks", type=int, default=6)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--parts", default=",".join(PARTS), help="which to switch off; '' for none")
    arguments = parser.parse_args()
    wanted = [part for part in arguments.parts.split(",") if part]
    unknown = set(wanted) - set(PARTS)
    if unknown:
        parser.error(f"--parts knows {', '.join(PARTS)}; got {', '.join(sorted(unknown))}")
    setting = Setting(arguments.streams, arguments.chunks, arguments.slots)
    runs = []
    for repeat in range(arguments.repeats):
        runs.append(setting.run(repeat))
        print(runs[-1], flush=True)

    def of(name: str) -> list[float]:
        return [run[name] for run in runs]

    claims = [
        common.claim("prompt tokens prefilled / all", of("prefilled"), "", target=0.35, lower_is_better=True),
        common.claim("the same, manager", of("prefilled_manager"), ""),
        common.claim("the same, reader", of("prefilled_reader"), ""),
        common.claim("slot occupancy", of("occupancy"), "", target=0.85),
        common.claim("slot occupancy, manager", of("occupancy_manager"), ""),
        common.claim("host time / all", of("host"), "", target=0.05, lower_is_better=True),
        common.claim("new tokens a second, all included", [r["tokens"] / r["seconds"] for r in runs], "tokens/s"),
    ]
    own_side = Setting(arguments.streams, 2, arguments.slots) if wanted else setting
    for part in wanted:
        other_side = Setting(arguments.streams, 2, arguments.slots)
        ratios = pairs(own_side, other_side, part, repeats=arguments.repeats)
        claims.append(common.claim(f"time for a token without / with {part}", ratios, "x"))
    common.report("rollout", claims, ["flax"])


if __name__ == "__main__":
    main()
