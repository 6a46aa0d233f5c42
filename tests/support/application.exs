# An application of its own, for tests that end it:
# `elixir application.exs PYTHON SHUTDOWN_GRACE [generate | generate-large]`.
# Says on standard output what it and its sidecar are doing, a line each time that changes.

defmodule Host do
  use Application

  @impl true
  def start(_type, opts),
    do: Supervisor.start_link([{StarweaveImage, opts}], strategy: :one_for_one)
end

defmodule Watch do
  def loop(last) do
    now = seen()

    if now != last do
      {os_pid, phase, ready?} = now
      IO.puts("sidecar #{os_pid} phase=#{phase} ready=#{ready?}")
    end

    Process.sleep(5)
    loop(now)
  end

  # The queue hears more of a sidecar than its status tells.
  defp seen do
    %{1 => %{heartbeat: beat} = seat} = :sys.get_state(StarweaveImage).crew.fleet.seats
    {seat.os_pid, if(beat, do: beat.phase, else: :silent), seat.ready != nil}
  end
end

[python, grace | work] = System.argv()
IO.puts("beam #{System.pid()}")
opts = [python: python, shutdown_grace: String.to_integer(grace), start_timeout: 300_000]
host = [applications: [:starweave_image], mod: {Host, opts}, vsn: ~c"1", modules: [Host]]
:ok = :application.load({:application, :host, host})
{:ok, _} = Application.ensure_all_started(:host)
spawn(fn -> Watch.loop(nil) end)

image = <<137, "PNG", 13, 10, 26, 10>> <> :binary.copy("x", 12 * 1024 * 1024 - 8)
input = if work == ["generate-large"], do: [image: image], else: []

if work != [] do
  opts = [steps: 100, num_images: 16, timeout: 3_600_000] ++ input

  for {kind, event} <- StarweaveImage.stream("a red apple", opts) do
    IO.puts("event #{kind} #{if kind == :progress, do: event.phase}")
  end
end

Process.sleep(:infinity)
