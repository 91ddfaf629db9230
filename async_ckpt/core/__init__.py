"""What both sides share: layouts, slots, messages, manifests. Imports neither torch nor numpy."""
