"""What a served model costs and gains: the demo, and measurements through real `vllm serve` processes.

The demo lives here because it is the smallest of these measurements; it shares the server and the
scoring with the others, and with the tests.
"""
