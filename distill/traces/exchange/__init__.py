"""Traces in the formats of other programs, out and back in.

    distillkit.py   DistillKit's logit data sets: compressed (bit-packed) or plain top-k columns in Parquet
    distillkit_codec.py   the bytes of the compressed form
    axolotl.py      axolotl's KD columns: target_token_ids, target_logprobs, target_mask
    trl.py          TRL's prompt and completion (text only)
    foreign.py      one row of such a data set, and traces from it
    importing.py    a data set of another program -> a folder of shards

Others align their rows with the model's positions: row j is about the token input_ids[j + 1]. Here row t is about token t of the
completion. The shift is made in `foreign`, in both directions.
"""
