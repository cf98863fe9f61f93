"""From a config to the objects of a run. The only module below the programs that reads a ConfigDict."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
from ml_collections import ConfigDict

from finemem_jax import input_pipeline, operations, reader, tokenizer
from finemem_jax.environment import Environment
from finemem_jax.episode import (
    Action,
    Chunk,
    Memory,
    Operation,
    Request,
    Stream,
    StreamSource,
    StreamSpec,
    random_key,
)
from finemem_jax.models import decoder, presets, sharding, weights
from finemem_jax.models.decoder import Params
from finemem_jax.models.presets import DecoderConfig
from finemem_jax.rollout import PolicyFn, RolloutOptions
from finemem_jax.sampler import Sampler
from finemem_jax.tokenizer import Tokenizer

# Words that questions are made of, so that retrieval finds such items; together with the bytes, 384 tokens.
_TEST_OPERATIONS = (
    *(Operation(Action.INSERT, f"what is the label of place {i}") for i in range(80)),
    *(Operation(Action.UPDATE, f"which day does it start {i}", 1 + i % 4) for i in range(24)),
    *(Operation(Action.DELETE, item_id=1 + i % 4) for i in range(12)),
    *(Operation(Action.SKIP) for _ in range(10)),
)


@dataclasses.dataclass(frozen=True)
class Parts:
    """What training and evaluation have in common.

    Attributes:
        params: The starting weights, on the mesh. Training takes them over; manager and reader hold copies.
        policy, answer: What rollouts call to sample from the manager, and to ask the reader.
    """

    model: DecoderConfig
    mesh: jax.sharding.Mesh
    params: Params
    tokenizer: Tokenizer
    environment: Environment
    manager: Sampler
    policy: PolicyFn
    reader_sampler: Sampler
    answer: reader.AnswerFn


@dataclasses.dataclass(frozen=True)
class FittedSource:
    """A stream source whose chunks fit the manager's prompt."""

    source: StreamSource
    environment: Environment

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Stream:
        return self.environment.fit(self.source[index])


def build(config: ConfigDict) -> Parts:
    """Loads tokenizer and weights, and builds environment, manager and reader.

    Raises:
        ValueError: a setting, a file or a mesh cannot work; nothing has been compiled yet.
    """
    model = presets.preset(config.model.name)
    path = None if config.model.weights == "random" else weights.locate(config.model.weights)
    tokens = _tokenizer(config, model, path)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    params = decoder.init(model, config.seed) if path is None else weights.load_gguf(model, path)
    params = sharding.place(model, params, mesh)
    environment = Environment(
        tokenizer=tokens,
        num_examples=config.manager.num_examples,
        view_tokens=config.memory.view_tokens,
        chunk_tokens=config.manager.chunk_tokens,
        long_chunk=config.manager.long_chunk,
        repair_json=config.manager.repair_json,
    )
    sampler = functools.partial(Sampler, model, params, tokens.end_ids, length_multiple=config.sampler.length_multiple)
    manager = sampler(num_slots=config.sampler.num_slots, steps_per_call=config.sampler.steps_per_call)
    reader_sampler = sampler(num_slots=config.reader.num_slots, steps_per_call=config.sampler.steps_per_call)

    def generate(chats: Sequence[tokenizer.EncodedChat]) -> list[tuple[int, ...]]:
        # The key is the prompt itself: the same question with the same evidence is answered alike, whoever asks.
        requests = [
            Request(chat.ids, chat.cuts, config.reader.max_new_tokens, config.reader.temperature,
                    random_key(config.seed, "reader", *chat.ids))
            for chat in chats
        ]  # fmt: skip
        return [completion.ids for completion in reader_sampler.generate(requests)]

    answer = reader.once_each(reader.language_model(generate, tokens, config.reader.num_examples))
    return Parts(model, mesh, params, tokens, environment, manager, manager.generate, reader_sampler, answer)


def _tokenizer(config, model, path):
    if config.model.tokenizer == "bytes":
        tokens: Tokenizer = tokenizer.ByteTokenizer()
    elif config.model.tokenizer == "bytes_and_operations":
        tokens = tokenizer.ByteTokenizer([f"{operations.render(operation)}\n" for operation in _TEST_OPERATIONS])
    elif path is None:
        raise ValueError("model.tokenizer is 'gguf', but model.weights is 'random'; set model.tokenizer='bytes'.")
    else:
        tokens = tokenizer.from_gguf(weights.open_gguf(path))
    if tokens.vocab_size > model.vocab_size:
        raise ValueError(
            f"The tokenizer ({config.model.tokenizer!r}) has {tokens.vocab_size} tokens, but model.name={model.name!r} "
            f"only {model.vocab_size}; choose the model that belongs to the tokenizer."
        )
    return tokens


def streams(config: ConfigDict, split: str, environment: Environment) -> FittedSource:
    """The streams of a split, "train" or "test", fitted to the environment."""
    spec = StreamSpec(
        split=split,
        seed=config.seed,
        num_streams=config.data.num_train if split == "train" else config.data.num_test,
        chunks_per_stream=config.data.chunks_per_stream,
        chunk_words=config.data.chunk_words,
        questions_per_chunk=config.data.questions_per_chunk,
        questions_per_stream=config.data.questions_per_stream,
        source_dir=config.data.source_dir,
    )
    return FittedSource(input_pipeline.load(config.data.name, spec), environment)


def check(config: ConfigDict, parts: Parts, train_streams: FittedSource, test_streams: FittedSource) -> None:
    """Refuses what would only fail later, in the middle of a run.

    Raises:
        ValueError: the longest prompt and response exceed the model; too few streams; a chunk that is to be refused.
    """
    trunk = parts.environment.observe(Chunk(""), Memory()).cuts[0]
    longest = trunk + config.manager.chunk_tokens + config.memory.view_tokens + config.rollout.max_new_tokens
    # The words around chunk and memory, and the reply's header.
    longest += 64
    if longest > parts.model.max_length:
        raise ValueError(
            f"manager.chunk_tokens ({config.manager.chunk_tokens}) + memory.view_tokens ({config.memory.view_tokens}) "
            f"+ rollout.max_new_tokens ({config.rollout.max_new_tokens}) and the instructions ({trunk}) can reach "
            f"{longest} tokens, more than {parts.model.name} takes ({parts.model.max_length}); lower one of them."
        )
    if len(train_streams) < config.rollout.streams_per_step:
        raise ValueError(
            f"rollout.streams_per_step is {config.rollout.streams_per_step}, but there are only {len(train_streams)} "
            "training streams; lower it, or raise data.num_train."
        )
    if not len(test_streams):
        raise ValueError("there are no held-out streams; raise data.num_test, or give data.source_dir more text.")
    if config.manager.long_chunk == "refuse":
        for source in (train_streams, test_streams):
            for index in range(len(source)):
                source[index]


def rollout_options(config: ConfigDict, evaluation: bool) -> RolloutOptions:
    """How streams are rolled out: in groups and sampled for training; once, greedily and in full for evaluation."""
    return RolloutOptions(
        group_size=1 if evaluation else config.rollout.group_size,
        max_new_tokens=config.rollout.max_new_tokens,
        temperature=0.0 if evaluation else config.rollout.temperature,
        retrieval=config.memory.retrieval,
        top_k=config.memory.top_k,
        global_question_fraction=1.0 if evaluation else config.rollout.global_question_fraction,
        global_question_threshold=config.rollout.global_question_threshold,
    )
