import array
import mmap

def scribble(
    memory: mmap.mmap | bytearray,
    places: array.array[int],
    values: array.array[int],
    seed: int,
    count: int,
) -> None: ...
