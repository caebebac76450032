"""The door: what a user typed becomes checked configs, or one message that lists every fault."""
