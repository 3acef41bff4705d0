"""A teacher that vLLM servers run: requests, answers, checks, and answers asked for ahead of time."""
