"""metrics.png: a run's loss and its velocity error over the steps."""
import math

from PIL import Image, ImageDraw, ImageFont

from support.files import from_json
from support.pictures import save_picture

WIDTH, HEIGHT, SCALE = 880, 300, 2                      # of a panel in pixels; drawn larger by SCALE, for smooth lines
LEFT, RIGHT, TOP, BOTTOM = 76, 28, 44, 46               # margins
INK, GRID, FAINT, LINE = (40, 40, 40), (226, 226, 226), (176, 205, 210), (0, 121, 140)


def read_values(path, name):
    """-> [(step, value), ...] of a log."""
    rows = [from_json(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [(row["step"], row[name]) for row in rows if isinstance(row.get(name), float) and math.isfinite(row[name])]


def ticks(low, high, n):
    """-> {number: text} of at most n + 2 round numbers that span low .. high."""
    size = 10 ** math.floor(math.log10((high - low) / n))
    size *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (size * factor) <= n)
    digits = max(0, -math.floor(math.log10(size)))
    return {i * size: f"{i * size:,.{digits}f}" for i in range(math.floor(low / size), math.ceil(high / size) + 1)}


def draw_panel(title, values, n, last):
    """values: [(step, value), ...], drawn faint, and as a line their means over n neighbours on each side; last: the
    last step on the axis -> PIL image."""
    panel = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), "white")
    draw, font = ImageDraw.Draw(panel), ImageFont.load_default(size=13 * SCALE)
    shown, wild = sorted(y for _, y in values), len(values) // 200              # the wildest may leave the panel
    low, high = shown[wild], shown[-1 - wild]
    room = max((high - low) / 20, abs(high) / 20, 1e-9)
    heights, steps = ticks(low - room, high + room, 5), ticks(0, last, 8)
    bottom, top = min(heights), max(heights)

    def place(step, y):
        x = LEFT + (WIDTH - LEFT - RIGHT) * step / last
        return x * SCALE, (TOP + (HEIGHT - TOP - BOTTOM) * (top - min(max(y, bottom), top)) / (top - bottom)) * SCALE

    for y, text in heights.items():
        draw.line([place(0, y), place(last, y)], INK if y == bottom else GRID, SCALE)
        draw.text((place(0, y)[0] - 8 * SCALE, place(0, y)[1]), text, INK, font, anchor="rm")
    for step, text in [item for item in steps.items() if item[0] <= last]:
        x, y = place(step, bottom)
        draw.line([(x, y), (x, y + 5 * SCALE)], INK, SCALE)
        draw.text((x, y + 9 * SCALE), text if step else "step 0", INK, font, anchor="mt")
    near = [[y for _, y in values[max(0, i - n):i + n + 1]] for i in range(len(values))]
    line = [(step, sum(ys) / len(ys)) for (step, _), ys in zip(values, near)]
    ends = ", ".join(f"{y:.3g} at step {step:,}" for step, y in (line[0], line[-1]))
    draw.text((LEFT * SCALE, 16 * SCALE), f"{title}: {ends}", INK, ImageFont.load_default(size=15 * SCALE))
    draw.line([place(*value) for value in values], FAINT, SCALE)
    draw.line([place(*value) for value in line], LINE, 2 * SCALE, joint="curve")
    for x, y in [place(*value) for value in line] if len(line) <= 50 else []:
        draw.ellipse([x - 4 * SCALE, y - 4 * SCALE, x + 4 * SCALE, y + 4 * SCALE], LINE)
    return panel.resize((WIDTH, HEIGHT), Image.LANCZOS)


def save_plot(out):
    """Write metrics.png from the logs in the run's folder `out`."""
    loss, error = read_values(out / "metrics.jsonl", "loss"), read_values(out / "validation.jsonl", "velocity_error")
    last = max([10, *(step for step, _ in loss + error)])
    panels = [draw_panel("training loss, running mean", loss, len(loss) // 40, last)] if loss else []
    panels += [draw_panel("velocity error on held-out pictures", error, 0, last)] if error else []
    if panels:
        picture = Image.new("RGB", (WIDTH, HEIGHT * len(panels)))
        for i, panel in enumerate(panels):
            picture.paste(panel, (0, i * HEIGHT))
        save_picture(out / "metrics.png", picture, f"{out}: loss and velocity error to step {last}")
