"""qoq chat: text from a checkpoint."""

import click

from qoq.cli.output import check_device, common_options, note, print_json


@click.command()
@click.argument("checkpoint")
@click.option("--prompt", required=True, help="What to answer.")
@click.option("--system", help="System message, before the prompt.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the chat template.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0: greedily.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, help="Of the probability mass.")
@click.option("--top-k", type=click.IntRange(min=0), default=0, help="Among so many tokens; 0: all.")
@click.option("--seed", type=int, help="For the same answer again.  [default: a new one]")
@click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda, cuda:1.")
@common_options
def chat(
    checkpoint: str,
    prompt: str,
    system: str | None,
    raw: bool,
    max_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int | None,
    device: str,
    as_json: bool,
) -> None:
    """Answer one prompt with CHECKPOINT."""
    import time

    from qoq.errors import QoqError
    from qoq.runtime.engine import LLMEngine
    from qoq.runtime.sampler import SamplingParams

    check_device(device)
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    engine = LLMEngine.from_checkpoint(checkpoint, device, max_num_seqs=1)
    tokens = engine.tokenizer(prompt).input_ids
    if not raw and engine.tokenizer.chat_template:
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": prompt})
        # the template alone says which special tokens there are
        tokens = engine.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    started = time.monotonic()
    for output in engine.stream(tokens, params):
        if not as_json:
            click.echo(output.delta, nl=False)
    seconds = time.monotonic() - started
    if output.error is not None:
        raise QoqError(output.error)
    if as_json:
        print_json(
            {
                "text": output.text,
                "finish_reason": output.finish_reason,
                "prompt_tokens": len(output.prompt_token_ids),
                "completion_tokens": len(output.token_ids),
                "seconds": round(seconds, 2),
            }
        )
        return
    click.echo()
    note(f"{len(output.token_ids)} tokens, {len(output.token_ids) / seconds:.1f} tokens/s")
