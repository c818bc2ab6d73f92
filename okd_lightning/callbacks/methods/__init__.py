"""Methods: what trains. Each is a Lightning callback that adds one weighted term to the loss."""
