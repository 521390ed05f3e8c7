"""What the drivers of SDKs share: they run where the SDK is, without the rest of the tests."""
import json
import sys


def answer_lines(run, status_error, more=()):
    """Answers each request on stdin, a line of JSON: what `run` returns, or what it raised, of `status_error` with its status and
    the attributes `more`."""
    for line in sys.stdin:
        try:
            answer = {"result": run(json.loads(line))}
        except Exception as error:  # noqa: BLE001 - whatever the SDK raises is the answer
            answer = {"raised": {"type": type(error).__name__, "message": str(error)}}
            if isinstance(error, status_error):
                answer["raised"] |= {"status": error.status_code, "message": error.message,
                                     **{name: getattr(error, name) for name in more}}
        print(json.dumps(answer), flush=True)
