"""Gives the sides of benchmarks/decode.py one interface: our sampler, transformers and llama.cpp.

side = SIDES[name](folder)  # Where `write_weights` has been.
side.forget()
ids = side.generate(prompts, temperature)
"""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import _common as common
import gguf
import jax

from experiments import smollm2_135m
from finemem_jax import config as config_lib
from finemem_jax.config.sections import Config
from finemem_jax.models import sharding
from finemem_jax.models.decoder import Params
from finemem_jax.models.presets import DecoderConfig
from finemem_jax.sampling.sampler import Sampler
from finemem_jax.types import Request, random_key
from finemem_jax.weights import files, hf_weights, pretrained

THREADS = common.machine()["cores"]
ROWS = 16  # Prompts at a time.
CONTEXT = 1024  # Room for a prompt and its new tokens.
HF_FOLDER, GGUF_FILE = "hugging_face", "q8_0.gguf"

# {"ids", "cuts": where the parts end that prompts share, and the prompt (`types.Request`), "new_tokens": to be drawn}.
Prompt = dict[str, Any]


class Side(Protocol):
    """One of those compared."""

    def forget(self) -> None:
        """Forgets whatever it remembers of prompts."""
        ...

    def generate(self, prompts: Sequence[Prompt], temperature: float) -> list[list[int]]:
        """Draws as many tokens for each prompt as that says; temperature 0 means greedy."""
        ...


def settings() -> Config:
    """Returns the experiment's settings, for streams of three chunks."""
    config = smollm2_135m.get_config()
    config.data.chunks_per_stream = 3
    config.reader.kind = "evidence"  # Nobody waits for answers here.
    return config_lib.parse(config)


def write_weights(folder: pathlib.Path) -> None:
    """Writes the experiment's weights in the form of each peer."""
    hf_weights.save(folder / HF_FOLDER, *_load())
    _write_gguf(files.locate(files.EMBEDDED), folder / GGUF_FILE)


def _load() -> tuple[DecoderConfig, Params]:
    found = pretrained.find(settings())
    return found.model, found.params(sharding.make_mesh(1, 1, 1))


def _write_gguf(source: pathlib.Path, path: pathlib.Path) -> None:
    """Writes a GGUF file again, its matrices as Q8_0 and its vectors in float32."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], inner)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    for tensor in reader.tensors:
        array = gguf.dequantize(tensor.data, tensor.tensor_type)
        kind = gguf.GGMLQuantizationType.Q8_0 if array.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Ours:
    """Our sampler. Its end token is one beyond the vocabulary, so no turn ends before it is as long as it must be."""

    def __init__(self, folder: pathlib.Path):
        """Loads the experiment's weights, which are those in `folder`."""
        config = settings()
        model, self.params = _load()
        self.sampler = Sampler(model, self.params, (model.vocab_size,), settings=config.sampler)

    def forget(self) -> None:
        """Begins with the weights anew, as after an update: what was computed with the old ones is dropped."""
        self.sampler.update(self.params, 0)
        jax.block_until_ready(jax.live_arrays())  # Copying weights belongs to training.

    def generate(self, prompts: Sequence[Prompt], temperature: float) -> list[list[int]]:
        """See `Side`."""
        requests = [
            Request(tuple(p["ids"]), tuple(p["cuts"]), p["new_tokens"], temperature, random_key("decode", i))
            for i, p in enumerate(prompts)
        ]
        return [list(completion.ids) for completion in common.completions(self.sampler.generate(requests))]


class Transformers:
    """transformers' `generate` on one left-padded batch."""

    def __init__(self, folder: pathlib.Path):
        """Loads the weights in float32."""
        self.torch = common.peer("torch", "pip install torch transformers")
        import transformers

        self.torch.set_num_threads(THREADS)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder / HF_FOLDER, dtype=self.torch.float32, attn_implementation="sdpa"
        ).eval()
        # No end token: it then neither stops at one nor spends time on forbidding it.
        self.model.generation_config.eos_token_id = self.model.config.eos_token_id = None
        self.settings = transformers.GenerationConfig

    def forget(self) -> None:
        """Does nothing: it remembers no prompts."""

    def generate(self, prompts: Sequence[Prompt], temperature: float) -> list[list[int]]:
        """See `Side`."""
        torch, longest = self.torch, max(len(p["ids"]) for p in prompts)
        ids = torch.tensor([[0] * (longest - len(p["ids"])) + list(p["ids"]) for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p["ids"])) + [1] * len(p["ids"]) for p in prompts])
        drawing = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        config = self.settings(max_new_tokens=max(p["new_tokens"] for p in prompts), pad_token_id=0, **drawing)
        made = self.model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, longest:]
        return [row[: p["new_tokens"]] for row, p in zip(made.tolist(), prompts, strict=True)]


class LlamaCpp:
    """llama-cpp-python's generator of tokens, one prompt after the other."""

    def __init__(self, folder: pathlib.Path):
        """Loads the weights in Q8_0."""
        llama_cpp = common.peer("llama_cpp", "pip install llama-cpp-python")
        self.model = llama_cpp.Llama(
            str(folder / GGUF_FILE), n_ctx=CONTEXT, n_threads=THREADS, n_threads_batch=THREADS, verbose=False
        )

    def forget(self) -> None:
        """Forgets the last prompt, whose beginning the next one might share."""
        self.model.reset()

    def generate(self, prompts: Sequence[Prompt], temperature: float) -> list[list[int]]:
        """See `Side`."""
        made = []
        for i, p in enumerate(prompts):
            self.model.set_seed(i)
            tokens = self.model.generate(p["ids"], temp=temperature, top_k=0, top_p=1.0, min_p=0.0)
            made.append(list(itertools.islice(tokens, p["new_tokens"])))
        return made


class LlamaCppBatched:
    """The C functions that llama-cpp-python binds; a prompt is a sequence of theirs."""

    def __init__(self, folder: pathlib.Path):
        """Loads the weights in Q8_0, and makes two contexts."""
        self.api = api = common.peer("llama_cpp", "pip install llama-cpp-python")
        # By default it prints a line for every tensor. The callback is kept, as C code does not keep it alive.
        self.log = api.llama_log_callback(lambda *_: None)
        api.llama_log_set(self.log, None)
        model = api.llama_model_load_from_file(str(folder / GGUF_FILE).encode(), api.llama_model_default_params())
        options = api.llama_context_default_params()
        options.n_seq_max, options.n_batch = ROWS, ROWS * CONTEXT
        options.n_threads = options.n_threads_batch = THREADS
        options.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED  # Slower on CPUs.
        # Sequences that share cells of one cache, or have caches of their own: the faster where nothing is shared.
        self.contexts = {}
        for shared in (True, False):
            options.kv_unified, options.n_ctx = shared, ROWS * CONTEXT // (2 if shared else 1)
            self.contexts[shared] = api.llama_init_from_model(model, options)
        self.batch = api.llama_batch_init(ROWS * CONTEXT, 0, 1)

    def forget(self) -> None:
        """Does nothing: every call begins with an empty memory."""

    def generate(self, prompts: Sequence[Prompt], temperature: float) -> list[list[int]]:
        """See `Side`. Prompts are computed first, then all rows are decoded together."""
        api, context = self.api, self.contexts[any(p["cuts"][0] for p in prompts)]
        memory = api.llama_get_memory(context)
        api.llama_memory_clear(memory, False)

        def decode(entries: Sequence[tuple[int, int, int, bool]]) -> None:
            self.batch.n_tokens = len(entries)
            for i, (token, position, sequence, wanted) in enumerate(entries):
                self.batch.token[i], self.batch.pos[i], self.batch.logits[i] = token, position, wanted
                self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, sequence
            status = api.llama_decode(context, self.batch)
            assert status == 0, status

        # Part by part: the first prompt of those that share one computes it, and the others copy it.
        done, last = [0] * len(prompts), [0] * len(prompts)
        for level in range(3):
            groups: dict[tuple[int, ...], list[int]] = {}
            for i, p in enumerate(prompts):
                groups.setdefault(tuple(p["ids"][: p["cuts"][level]]), []).append(i)
            entries: list[tuple[int, int, int, bool]] = []
            for ids, members in groups.items():
                first = members[0]
                entries += [(ids[n], n, first, level == 2 and n == len(ids) - 1) for n in range(done[first], len(ids))]
                for i in members:
                    last[i] = len(entries) - 1
            if entries:
                decode(entries)
            for ids, members in groups.items():
                for i in members[1:] if done[members[0]] < len(ids) else ():
                    api.llama_memory_seq_cp(memory, members[0], i, done[i], len(ids))
                for i in members:
                    done[i] = len(ids)

        samplers = [api.llama_sampler_chain_init(api.llama_sampler_chain_default_params()) for _ in prompts]
        for i, sampler in enumerate(samplers):
            steps = [api.llama_sampler_init_temp(temperature), api.llama_sampler_init_dist(i)]
            for step in steps if temperature else [api.llama_sampler_init_greedy()]:
                api.llama_sampler_chain_add(sampler, step)
        made = [[api.llama_sampler_sample(sampler, context, last[i])] for i, sampler in enumerate(samplers)]
        while going := [i for i, p in enumerate(prompts) if len(made[i]) < p["new_tokens"]]:
            decode([(made[i][-1], done[i] + len(made[i]) - 1, i, True) for i in going])
            for row, i in enumerate(going):
                made[i].append(api.llama_sampler_sample(samplers[i], context, row))
        for sampler in samplers:
            api.llama_sampler_free(sampler)
        return made


SIDES: dict[str, Callable[[pathlib.Path], Side]] = {
    "ours": Ours, "transformers": Transformers, "llama.cpp": LlamaCpp, "llama.cpp, batched": LlamaCppBatched
}  # fmt: skip
