"""From source images to tar shards: plan, pack, verify, and where the bytes are kept."""
