defmodule Chaos.Soak do
  # Good and bad requests of all kinds for an hour, with a kill now and then: what succeeds, and whether memory grows.

  import StarweaveImage.TestOSProcess, only: [await: 2]

  alias Chaos.Watch

  @clients 4
  @small [width: 64, height: 64, steps: 2, timeout: 120_000]
  @valid ~w(one many large stream submitted durable edit background)a
  @bad ~w(invalid unknown_model hurried cancelled deserted left_early)a

  def run(%{full?: full?, minutes: minutes}) do
    minutes = minutes || if full?, do: 60, else: 1
    journal = Path.join(Chaos.folder(), "soak")

    mark = Chaos.mark()

    # Results that nobody comes for are forgotten soon, so that their number is steady within the first minutes.
    instance = Chaos.start(sidecars: 2, journal: journal, result_ttl: 60_000)
    {:ok, start} = StarweaveImage.generate("a red apple", [instance: instance] ++ @small)
    counts = :ets.new(:counts, [:public, :set])
    ends = Chaos.now() + minutes * 60_000

    tasks =
      for n <- 1..@clients, do: Task.async(fn -> client(instance, start, counts, ends, n) end)

    killer = Task.async(fn -> kill_now_and_then(instance, ends, minutes) end)
    log = Task.async(fn -> log(instance, counts, ends, minutes) end)
    Task.await_many(tasks, :infinity)
    kills = Task.await(killer, :infinity)
    rows = Task.await(log, :infinity)
    %{queue: queue} = StarweaveImage.status(instance: instance)
    Chaos.stop(instance)
    orphans = Chaos.orphans(mark)

    figures(:ets.tab2list(counts), rows, minutes) ++
      [
        {"sidecars killed", kills, nil},
        {"left in the queue at the end (waiting, running, bytes)",
         "#{queue.queued}, #{queue.running}, #{queue.bytes}",
         {queue.queued, queue.running, queue.bytes} == {0, 0, 0}},
        {"processes left behind", length(orphans), orphans == []}
      ]
  end

  defp figures(counts, rows, minutes) do
    asked = for({{kind, _}, n} <- counts, kind in @valid, do: n) |> Enum.sum()
    done = for({{kind, :ok}, n} <- counts, kind in @valid, do: n) |> Enum.sum()

    failed =
      for {{kind, outcome}, n} <- counts,
          kind in @valid,
          outcome != :ok,
          do: "#{n} #{kind} #{outcome}"

    wrong =
      for {{kind, outcome}, n} <- counts,
          kind in @bad,
          not expected?(kind, outcome),
          do: "#{n} #{kind} #{outcome}"

    bad = for({{kind, _}, n} <- counts, kind in @bad, do: n) |> Enum.sum()

    share = if asked > 0, do: Float.round(100 * done / asked, 3), else: 0.0

    [
      {"minutes; valid requests; bad ones", "#{minutes}; #{asked}; #{bad}", nil},
      {"valid requests that succeeded", "#{done} (#{share} %)", share > 99.9},
      {"valid ones that did not", Enum.join(failed, ", "), nil},
      {"bad ones that ended as they must not", Enum.join(wrong, ", "), wrong == []}
    ] ++ memory(rows, minutes)
  end

  # The last quarter against the second one: what is loaded and kept has come by then.
  defp memory(rows, minutes) do
    for {key, name} <- [
          python: "RSS of the Python that nobody kills",
          beam: "RSS of the BEAM",
          total: ":erlang.memory(:total)"
        ] do
      values = for row <- rows, do: row[key]
      quarter = max(div(length(values), 4), 1)
      early = values |> Enum.drop(quarter) |> Enum.take(quarter) |> Chaos.median()
      late = values |> Enum.take(-quarter) |> Chaos.median()
      growth = Float.round(100 * (late - early) / early, 1)

      {"#{name}, MiB: second quarter, last quarter, growth",
       "#{Chaos.mebibytes(early)}, #{Chaos.mebibytes(late)}, #{growth} %",
       if(minutes >= 30, do: growth < 5)}
    end
  end

  defp client(instance, start, counts, ends, n) do
    :rand.seed(:exsss, {n, 1, 1})

    Stream.repeatedly(fn -> Enum.random(@valid ++ @bad ++ [:one, :one]) end)
    |> Enum.find(fn kind ->
      outcome = act(kind, instance, start)
      :ets.update_counter(counts, {kind, outcome}, 1, {{kind, outcome}, 0})
      Process.sleep(200 + :rand.uniform(1_000))
      Chaos.now() > ends
    end)
  end

  defp act(:one, i, _), do: StarweaveImage.generate(prompt(), opts(i)) |> outcome()

  defp act(:background, i, _),
    do: StarweaveImage.generate(prompt(), opts(i, priority: :background)) |> outcome()

  defp act(:many, i, _), do: StarweaveImage.generate_many(prompt(), 3, opts(i)) |> outcome()

  defp act(:large, i, _),
    do: StarweaveImage.generate(prompt(), opts(i, width: 256, height: 256)) |> outcome()

  defp act(:edit, i, start), do: StarweaveImage.edit(start, prompt(), opts(i)) |> outcome()

  defp act(:stream, i, _) do
    StarweaveImage.stream(prompt(), opts(i, preview: true))
    |> Enum.to_list()
    |> List.last()
    |> outcome()
  end

  defp act(:submitted, i, _) do
    {:ok, id} = StarweaveImage.submit(prompt(), opts(i))
    StarweaveImage.await(id, 120_000, instance: i) |> outcome()
  end

  defp act(:durable, i, _) do
    {:ok, id} = StarweaveImage.submit(prompt(), opts(i, durable: true))
    StarweaveImage.await(id, 120_000, instance: i) |> outcome()
  end

  defp act(:invalid, i, _) do
    wrong =
      Enum.random([
        [steps: 0],
        [width: 65],
        [format: :gif],
        [guidance: 1],
        [scheduler: "no such one"]
      ])

    StarweaveImage.generate(prompt(), opts(i, wrong)) |> outcome()
  end

  defp act(:unknown_model, i, _),
    do: StarweaveImage.generate(prompt(), opts(i, model: "nobody/nothing")) |> outcome()

  defp act(:hurried, i, _),
    do: StarweaveImage.generate(prompt(), opts(i, timeout: :rand.uniform(50))) |> outcome()

  defp act(:cancelled, i, _) do
    {:ok, id} = StarweaveImage.submit(prompt(), opts(i, steps: 20))
    Process.sleep(:rand.uniform(200))
    StarweaveImage.cancel(id, instance: i)
    StarweaveImage.await(id, 120_000, instance: i) |> outcome()
  end

  defp act(:deserted, i, _) do
    id = "deserted-#{System.unique_integer([:positive])}"

    {caller, monitor} =
      spawn_monitor(fn -> StarweaveImage.generate(prompt(), opts(i, id: id, steps: 20)) end)

    Process.sleep(:rand.uniform(200))
    Process.exit(caller, :kill)
    receive do: ({:DOWN, ^monitor, _, _, _} -> :ok)

    if await(fn -> StarweaveImage.cancel(id, instance: i) == {:error, :not_found} end, 5_000),
      do: :cancelled,
      else: :goes_on
  end

  defp act(:left_early, i, _) do
    StarweaveImage.stream(prompt(), opts(i, steps: 20)) |> Enum.take(:rand.uniform(5))
    :cancelled
  end

  defp outcome({:ok, _}), do: :ok
  defp outcome({:image, _}), do: :ok
  defp outcome({:error, error}), do: error.kind

  defp expected?(:invalid, outcome), do: outcome == :invalid_request
  defp expected?(:unknown_model, outcome), do: outcome == :model_not_found
  defp expected?(:hurried, outcome), do: outcome in [:timeout, :ok]
  defp expected?(:cancelled, outcome), do: outcome in [:cancelled, :ok]
  defp expected?(_kind, outcome), do: outcome == :cancelled

  defp opts(instance, more \\ []), do: [instance: instance] ++ more ++ @small

  # Not so many that what text encoders remember of them would grow for an hour.
  defp prompt do
    "a #{Enum.random(~w(red green blue))} #{Enum.random(~w(apple boat house))} #{:rand.uniform(50)}"
  end

  # Always the second of the two: the memory of the first one is watched from its start to its end.
  defp kill_now_and_then(instance, ends, minutes) do
    pause = if minutes < 30, do: 20_000, else: 240_000

    Stream.repeatedly(fn ->
      Process.sleep(min(pause, max(ends - Chaos.now(), 0)))

      if Chaos.now() < ends,
        do: for(%{index: 2, os_pid: pid} <- Watch.alive(instance), do: Chaos.signal(pid, "KILL"))
    end)
    |> Enum.take_while(& &1)
    |> length()
  end

  # A row each minute, or each 5 s of a short one.
  defp log(instance, counts, ends, minutes) do
    pause = if minutes < 30, do: 5_000, else: 60_000

    IO.puts(
      "time, seconds left, done, Python RSS, BEAM RSS, :erlang.memory(:total), processes, queued"
    )

    Stream.repeatedly(fn ->
      Process.sleep(min(pause, max(ends - Chaos.now(), 0)))
      if Chaos.now() < ends, do: row(instance, counts, ends)
    end)
    |> Enum.take_while(& &1)
  end

  defp row(instance, counts, ends) do
    [python | _] = for %{index: 1, os_pid: pid} <- Watch.alive(instance), do: pid

    row = %{
      python: Chaos.resident(python),
      beam: Chaos.resident(System.pid()),
      total: :erlang.memory(:total)
    }

    done = for({{_, :ok}, n} <- :ets.tab2list(counts), do: n) |> Enum.sum()
    sizes = Enum.map_join([:python, :beam, :total], ", ", &Chaos.mebibytes(row[&1]))
    %{queue: queue} = StarweaveImage.status(instance: instance)
    left = div(ends - Chaos.now(), 1_000)

    IO.puts(
      "#{Time.truncate(Time.utc_now(), :second)}, #{left}, #{done}, #{sizes}, #{length(Process.list())}, #{queue.queued}"
    )

    row
  end
end
