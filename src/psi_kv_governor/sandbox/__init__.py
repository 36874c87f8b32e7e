"""A memory cgroup of its own in which the governor is shown, tuned and measured.

What is started in it is gone afterwards, whatever happens to the process that made it.
"""
