# An application of its own with a journal, for bench/chaos/beams.exs, which ends it:
# `elixir host.exs FOLDER PYTHON LIFE JOBS`. What it was told it writes to FOLDER/log, a line each, before it goes on:
#
#     beam LIFE PID | sidecar LIFE PID
#     acked LIFE ID SEED                      the request was accepted
#     begun LIFE ID | drawn LIFE ID           the queue has it to do | a sidecar works on it
#     told LIFE ID SHA256 SEED | told LIFE ID error KIND
#     again LIFE ID …                         as `told`, of one that an earlier life was told of
#     over LIFE

Code.require_file("../../tests/support/telemetry.ex", __DIR__)

defmodule Host do
  def run(folder, python, life, jobs) do
    log = Path.join(folder, "log")
    say = fn line -> File.write!(log, line <> "\n", [:append, :raw]) end

    known =
      if File.exists?(log), do: log |> File.read!() |> String.split("\n", trim: true), else: []

    say.("beam #{life} #{System.pid()}")
    listen(say, life)

    {:ok, _} =
      StarweaveImage.start_link(
        python: python,
        env: ["STARWEAVE_CHAOS"],
        journal: Path.join(folder, "journal"),
        max_queue: 10_000,
        max_results: 10_000,
        result_ttl: 604_800_000
      )

    acked = for "acked " <> rest <- known, [_, id, _] <- [String.split(rest)], do: id
    told = for "told " <> rest <- known, [_, id | _] <- [String.split(rest)], do: id

    waiting =
      for id <- Enum.uniq(acked) -- told do
        Task.async(fn ->
          # A client that does not know whether it was heard asks again.
          if :rand.uniform(2) == 1, do: {:ok, ^id} = submit(id)
          tell(say, "told", life, id)
        end)
      end

    again =
      for id <- told |> Enum.uniq() |> Enum.take_random(5),
          do: Task.async(fn -> tell(say, "again", life, id) end)

    new =
      for n <- 1..jobs//1 do
        id = "job-#{life}-#{n}"
        {:ok, ^id} = submit(id)
        say.("acked #{life} #{id} #{:sys.get_state(StarweaveImage).jobs[id].request.seed}")
        Process.sleep(:rand.uniform(150))
        Task.async(fn -> tell(say, "told", life, id) end)
      end

    Task.await_many(waiting ++ again ++ new, :infinity)
    say.("over #{life}")
    if jobs > 0, do: Process.sleep(:infinity)
  end

  # The seed is drawn by the library.
  defp submit(id) do
    opts = [steps: 4, width: 64, height: 64, reproducible: true, timeout: 36_000_000]
    StarweaveImage.submit("a fig of #{id}", [id: id, durable: true] ++ opts)
  end

  defp tell(say, word, life, id) do
    case StarweaveImage.await(id, 3_600_000) do
      {:ok, image} ->
        sum = Base.encode16(:crypto.hash(:sha256, image.data), case: :lower)
        say.("#{word} #{life} #{id} #{sum} #{image.seed}")

      {:error, error} ->
        say.("#{word} #{life} #{id} error #{error.kind}")
    end
  end

  defp listen(say, life) do
    main = self()

    spawn_link(fn ->
      :telemetry.listen()
      send(main, :listening)
      heard(say, life, MapSet.new())
    end)

    receive do: (:listening -> :ok)
  end

  defp heard(say, life, lines) do
    line =
      receive do
        {:telemetry, [_, _, :sidecar, :start], _, %{os_pid: pid}} -> "sidecar #{life} #{pid}"
        {:telemetry, [_, _, :request, :start], _, %{id: id}} -> "begun #{life} #{id}"
        {:telemetry, [_, _, :request, :progress], _, %{id: id}} -> "drawn #{life} #{id}"
        _other -> nil
      end

    if line && line not in lines, do: say.(line)
    heard(say, life, MapSet.put(lines, line))
  end
end

Logger.configure(level: :warning)
[folder, python, life, jobs] = System.argv()
Host.run(folder, python, life, String.to_integer(jobs))
