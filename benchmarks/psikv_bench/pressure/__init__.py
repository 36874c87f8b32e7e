"""The pressure scene: its setting, its figures and its plots."""
