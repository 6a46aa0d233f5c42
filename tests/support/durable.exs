# An application that hands in durable requests, for tests that kill it: `elixir durable.exs PYTHON JOURNAL LIFE`.
# Says in the file `ids` beside the journal what was acknowledged, and on standard output what was begun and done, a line each. In the life "wait" it hands in nothing new.

defmodule :telemetry do
  def execute([_, _, :request, :progress], %{step: 1}, %{id: id}), do: IO.puts("begun #{id}")
  def execute(_event, _measurements, _metadata), do: :ok
end

[python, journal, life] = System.argv()
IO.puts("beam #{System.pid()}")
{:ok, _} = Application.ensure_all_started(:starweave_image)
ids = Path.join(Path.dirname(journal), "ids")

say = fn id ->
  case StarweaveImage.await(id) do
    {:ok, image} -> IO.puts("done #{id} #{image.seed}-#{image.sha256}")
    {:error, error} -> IO.puts("done #{id} #{error.kind}")
  end
end

{:ok, _} =
  StarweaveImage.start_link(
    python: python,
    journal: journal,
    heartbeat_interval: 50,
    capacity: 2,
    max_results: 100_000
  )

:ok = StarweaveImage.await_ready()

# Those of earlier lives, which were acknowledged: each is asked for again.
earlier = with {:ok, text} <- File.read(ids), do: String.split(text), else: (_ -> [])
known = for id <- earlier, do: Task.async(fn -> say.(id) end)

if life == "wait" do
  Enum.each(known, &Task.await(&1, :infinity))
  IO.puts("all done")
else
  for n <- Stream.iterate(1, &(&1 + 1)) do
    {:ok, id} = StarweaveImage.submit("fig #{n}", id: "#{life}-#{n}", durable: true)
    File.write!(ids, id <> "\n", [:append, :sync])
    Task.async(fn -> say.(id) end)
    if rem(n, 10) == 0, do: StarweaveImage.await(id)
  end
end

Process.sleep(:infinity)
