"""An image folder becomes tar shards that any WebDataset reader opens."""
