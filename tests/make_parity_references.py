"""Writes tests/parity/*.npz: what transformers computes for the models of parity_cases.py.

    PYTHONPATH=. python tests/make_parity_references.py

Needs PyTorch, which finemem_jax itself does not. Run it again when parity_cases.py changes, and commit what it writes;
`parity_test.py` compares with these files everywhere, and with transformers itself where PyTorch is installed.
"""

import pathlib

import numpy as np

import parity_cases

FOLDER = pathlib.Path(__file__).parent / "parity"


def build(config):
    """The case as a transformers model in float32."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers

    fields = parity_cases.config_json(config)
    classes = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    }
    config_class, model_class = classes[config.family]
    model = model_class(config_class(**fields)).to(torch.float32).eval()
    tensors = parity_cases.checkpoint(config)
    if config.tie_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict({name: torch.tensor(tensor) for name, tensor in tensors.items()})
    return model


def compute(config):
    """Log-probabilities [tokens, V] of all rows one after the other, and the gradient of the mean of the next tokens'.

    Returns:
        The log-probabilities, and {Hugging Face's name: gradient}.
    """
    import torch  # pyright: ignore[reportMissingImports]

    model = build(config)
    rows = [torch.tensor(row) for row in parity_cases.token_rows(config)]
    log_probs = [torch.log_softmax(model(row[None]).logits[0], -1) for row in rows]
    chosen = [lp[:-1].gather(1, row[1:, None]) for lp, row in zip(log_probs, rows, strict=True)]
    torch.cat(chosen).mean().backward()
    gradients = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    return torch.cat(log_probs).detach().numpy(), gradients


def generate(config):
    """What transformers' greedy `generate` adds to each prompt, one array a prompt."""
    import torch  # pyright: ignore[reportMissingImports]

    model = build(config)
    options = {"do_sample": False, "max_new_tokens": parity_cases.NEW_TOKENS, "pad_token_id": 0}
    found = []
    for prompt in parity_cases.prompts(config):
        ids = torch.tensor([prompt])
        # Told, or it would take tokens 0 for padding.
        ids = model.generate(
            ids, attention_mask=torch.ones_like(ids), eos_token_id=list(parity_cases.END_IDS), **options
        )
        found.append(ids[0, len(prompt) :].numpy())
    return found


def main():
    FOLDER.mkdir(exist_ok=True)
    for name, config in parity_cases.CASES.items():
        log_probs, gradients = compute(config)
        arrays = {"log_probs": log_probs}
        for parameter, gradient in gradients.items():
            entries = parity_cases.stored_entries(parameter, gradient.size)
            arrays[f"norm/{parameter}"] = np.linalg.norm(gradient.astype(np.float64))
            arrays[f"entries/{parameter}"] = gradient.reshape(-1)[entries]
        generated = generate(config)
        arrays |= {"generated": np.concatenate(generated), "generated_lengths": [len(ids) for ids in generated]}
        np.savez_compressed(FOLDER / f"{name}.npz", **arrays)
    print(f"wrote {len(parity_cases.CASES)} files to {FOLDER}")


if __name__ == "__main__":
    main()
