"""From stored records to packed rows of tokens."""

from msn_jax.cli import InputError
from msn_jax.config import Config
from msn_jax.data import batches, chat, corpora, record_files
from msn_jax.data.tokenizer import Tokenizer


def load_rows(cfg: Config, tokenizer: Tokenizer) -> tuple[batches.Rows, batches.Rows]:
    """The packed rows of the training and the validation split; prints their statistics.

    Raises:
      InputError: a record cannot be read or tokenized, with its file and line; with `data.on_bad_record='skip'`, more
        than 5% of them; or a split is empty.
    """
    splits = corpora.load_splits(cfg.data)
    total = sum(map(len, splits.values()))
    bad = splits.pop(corpora.BAD)
    samples = {split: _encode(cfg, tokenizer, records, bad) for split, records in splits.items()}
    record_files.report_bad(cfg.data.path, bad, total)
    rows = []
    for split in corpora.SPLITS:
        rows.append(batches.pack(samples[split], cfg.data.row_length, f"{source_name(cfg)} ({split})"))
        print(f"{split}: {len(rows[-1])} rows, {rows[-1].stats}")
    return tuple(rows)


def _encode(cfg: Config, tokenizer: Tokenizer, records: list[dict], bad: list[dict]) -> list[batches.Sample]:
    """The samples of the records. Appends the records that cannot be tokenized to `bad`, or raises for the first."""
    samples = []
    for record in records:
        location = record.get("location", source_name(cfg))
        content = {name: field for name, field in record.items() if name != "location"}
        try:
            samples.append(chat.encode_record(tokenizer, content, cfg.data.parse_special_tokens))
        except InputError as error:
            if cfg.data.on_bad_record == "stop" or cfg.data.builder != "sft_jsonl":
                raise InputError(f"{location}: {error}") from error
            bad.append({"error": str(error), "location": location})
    return samples


def record_texts(record: dict) -> list[str]:
    """The texts of a record of any form, for training a tokenizer."""
    if "messages" in record:
        return [message["content"] for message in record["messages"] if message["content"] is not None]
    return [record[name] for name in ("text", "prompt", "response") if name in record]


def source_name(cfg: Config) -> str:
    """Names the data in messages: the file, or the builder if it has none."""
    return cfg.data.path or cfg.data.builder
