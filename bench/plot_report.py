# SPDX-License-Identifier: Apache-2.0
"""A picture of the page that replay --report wrote, as a browser shows it."""
import pathlib
import shutil
import subprocess
import tempfile

from PIL import Image

from plot_style import InputError, save_image


def report(options):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        raise InputError("there is no Chromium to open the page with; on Debian: apt-get install chromium")
    if not options.html.is_file():
        raise InputError(f"{options.html} is no file")
    with tempfile.TemporaryDirectory() as folder:
        shot = pathlib.Path(folder) / "shot.png"
        # Without the sandbox, which root cannot have; the page asks for nothing outside of itself.
        subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                        f"--user-data-dir={folder}/profile", f"--window-size={options.width},{options.height}",
                        f"--screenshot={shot}", options.html.resolve().as_uri()], capture_output=True, check=False)
        if not shot.is_file():
            raise InputError(f"{browser} could not draw {options.html}")
        with Image.open(shot) as image:
            # The other way drops what is rare, such as the red of what was given up.
            save_image(image, options.output / "report.png", Image.Quantize.FASTOCTREE)
    print(f"drawn: {options.output / 'report.png'}")
