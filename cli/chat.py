"""qoq chat: text from a checkpoint."""

import click

from qoq.cli.output import common_options, note, print_json


@click.command()
@click.argument("checkpoint")
@click.option("--prompt", required=True, help="What to answer.")
@click.option("--system", help="System message, before the prompt.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the chat template.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@common_options
def chat(checkpoint: str, prompt: str, system: str | None, raw: bool, max_tokens: int, as_json: bool) -> None:
    """Answer one prompt with CHECKPOINT, greedily, on the CPU."""
    import time

    from qoq.runtime.engine import LLMEngine, SamplingParams

    engine = LLMEngine.from_checkpoint(checkpoint)
    if not raw and engine.tokenizer.chat_template:
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": prompt})
        prompt = engine.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    started = time.monotonic()
    output = engine.generate([prompt], SamplingParams(max_tokens=max_tokens))[0]
    seconds = time.monotonic() - started
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
    click.echo(output.text)
    note(f"{len(output.token_ids)} tokens, {len(output.token_ids) / seconds:.1f} tokens/s")
