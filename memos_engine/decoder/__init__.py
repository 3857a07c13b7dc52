"""The paged-attention decoder; knows tokens and KV records, not users or stores."""
