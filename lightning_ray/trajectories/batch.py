"""The batch that a learner trains on: one row per token sequence, Arrow list columns.

Invariant: `token_ids`, `trainable`, `logprobs`, `versions` and `advantages` of a row have the same
length. A sequence is one root-to-leaf path of an attempt's token tree, so a history that several
calls share appears once per leaf; each sampled token is `trainable` in exactly one row.
"""

import pyarrow as pa

SEQUENCE_SCHEMA = pa.schema(
    [
        # Sequences with one group are samples of the same task: they are compared with each other.
        pa.field("group_id", pa.string(), nullable=False),
        pa.field("rollout_id", pa.string(), nullable=False),
        pa.field("attempt_id", pa.string(), nullable=False),
        pa.field("policy", pa.string(), nullable=False),
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
        # True where the policy sampled the token and it is to be learnt from.
        pa.field("trainable", pa.list_(pa.bool_()), nullable=False),
        # Logprob under the policy that sampled it; 0 where not trainable.
        pa.field("logprobs", pa.list_(pa.float32()), nullable=False),
        # The policy version that sampled it; -1 where not trainable.
        pa.field("versions", pa.list_(pa.int32()), nullable=False),
        # Credit of the token; 0 where not trainable, and before an algorithm has given any.
        pa.field("advantages", pa.list_(pa.float32()), nullable=False),
    ]
)
