def f(x):
    return "passed" * (1 << 22)
