# What Elixir, the port and the engine add to one stock diffusers call:
#
#     mix run bench/overhead.exs [PAIRS] [COLD_PAIRS]
#
# Ratios against bench/stock.py, which runs beside it: one call here, one there, in turn, medians. The baseline has
# the same dtype, memory format and thread settings, so that what is left is what this library adds.

[pairs, cold_pairs] =
  case System.argv() do
    [pairs, cold] -> [String.to_integer(pairs), String.to_integer(cold)]
    [pairs] -> [String.to_integer(pairs), 5]
    [] -> [40, 5]
  end

defmodule Overhead do
  def median(values) do
    sorted = Enum.sort(values)
    n = length(sorted)
    (Enum.at(sorted, div(n - 1, 2)) + Enum.at(sorted, div(n, 2))) / 2
  end

  def ms(fun) do
    start = System.monotonic_time(:microsecond)
    result = fun.()
    {(System.monotonic_time(:microsecond) - start) / 1000, result}
  end

  # Peak resident memory of a process, MiB.
  def peak(os_pid) do
    [_, kib] = Regex.run(~r/VmHWM:\s+(\d+) kB/, File.read!("/proc/#{os_pid}/status"))
    String.to_integer(kib) / 1024
  end

  def line(port) do
    receive do
      {^port, {:data, {:eol, line}}} -> line
      {^port, {:exit_status, status}} -> raise "the baseline ended with status #{status}"
    after
      300_000 -> raise "the baseline does not answer"
    end
  end

  def row(name, ours, stock, unit) do
    ratios = Enum.zip_with(ours, stock, &(&1 / &2))

    IO.puts(
      "| #{name} | #{round1(median(ours))} #{unit} | #{round1(median(stock))} #{unit} | " <>
        "#{Float.round(median(ratios), 3)} | #{length(ours)} |"
    )
  end

  defp round1(x), do: Float.round(x * 1.0, 1)
end

{:ok, python} = StarweaveImage.Environment.python()
model = Application.app_dir(:starweave_image, "priv/models/starweave-tiny")
stock = Path.expand("stock.py", __DIR__)
request = [width: 64, height: 64, steps: 20, guidance_scale: 4.0]

{:ok, instance} = StarweaveImage.start_link([])
:ok = StarweaveImage.load_model("starweave/tiny")
{:ok, _} = StarweaveImage.generate("a red apple", [seed: 0] ++ request)
%{sidecars: [sidecar]} = StarweaveImage.status()

# What the engine does on a CPU in bfloat16.
same =
  ["--dtype", sidecar.dtype] ++ if sidecar.dtype == "bfloat16", do: ["--channels-last"], else: []

baseline =
  Port.open({:spawn_executable, python}, [
    :binary,
    :exit_status,
    line: 1000,
    env: [{~c"OMP_WAIT_POLICY", ~c"PASSIVE"}],
    args: [stock, model, "--serve" | same]
  ])

{:os_pid, baseline_pid} = Port.info(baseline, :os_pid)
"ready" = Overhead.line(baseline)

{ours, theirs} =
  Enum.map(1..pairs, fn seed ->
    here = fn ->
      {ms, {:ok, _}} =
        Overhead.ms(fn -> StarweaveImage.generate("a red apple", [seed: seed] ++ request) end)

      ms
    end

    there = fn ->
      Port.command(baseline, "#{seed}\n")
      baseline |> Overhead.line() |> String.to_float()
    end

    # Whoever comes second may find the machine warmer or busier: take turns in that too.
    if rem(seed, 2) == 0,
      do: {here.(), there.()},
      else: {there.(), here.()} |> then(fn {b, a} -> {a, b} end)
  end)
  |> Enum.unzip()

IO.puts(
  "device #{sidecar.device} (#{sidecar.device_name}), #{sidecar.dtype}; #{inspect(sidecar.versions)}"
)

IO.puts("| figure | ours | stock | ratio (median of pairs) | pairs |\n|---|---|---|---|---|")
Overhead.row("one 20-step request, warm", ours, theirs, "ms")

beam = Overhead.peak(System.pid())
[os_pid] = Enum.map(StarweaveImage.status().sidecars, & &1.os_pid)

Overhead.row(
  "peak RSS, BEAM and Python together",
  [beam + Overhead.peak(os_pid)],
  [Overhead.peak(baseline_pid)],
  "MiB"
)

Overhead.row(
  "peak RSS, Python alone",
  [Overhead.peak(os_pid)],
  [Overhead.peak(baseline_pid)],
  "MiB"
)

Port.close(baseline)
Supervisor.stop(instance)

out = Path.join(System.tmp_dir!(), "starweave_image_bench_#{System.pid()}.png")
size = ~w(--width 64 --height 64 --steps 20 --guidance_scale 4.0 --seed 0)

{cold, bare} =
  Enum.map(1..cold_pairs//1, fn _ ->
    {here, {_, 0}} =
      Overhead.ms(fn ->
        System.cmd(
          "mix",
          ["image.gen", "--quiet", "--prompt", "a red apple", "--out", out] ++ size,
          env: [{"MIX_ENV", to_string(Mix.env())}]
        )
      end)

    {there, {_, 0}} =
      Overhead.ms(fn ->
        System.cmd(python, [stock, model, "--out", out] ++ same,
          env: [{"OMP_WAIT_POLICY", "PASSIVE"}],
          stderr_to_stdout: true
        )
      end)

    {here / 1000, there / 1000}
  end)
  |> Enum.unzip()

if cold != [],
  do: Overhead.row("cold start to picture: mix image.gen / Python script", cold, bare, "s")

_ = File.rm(out)
