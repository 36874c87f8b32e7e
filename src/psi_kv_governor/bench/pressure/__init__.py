"""The pressure benchmark: one scene under one load, fixed, by the reference method and governed by turns."""
