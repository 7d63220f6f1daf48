"""Tests and the code under test, apart: each in a process and a jail of its own, with nothing between but two pipes.

In one process code can rewrite the tests, the assertions and the verdict; here it can only answer questions. `server`
runs in the code's jail, `judge` in the tests'; what the judge gets are plain values that it builds itself, or stand-ins
for objects that stay where they are. Only the standard library is used: the jail has nothing else.
"""
