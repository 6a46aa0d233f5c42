defmodule Chaos.Poison do
  # One request whose every attempt ends its sidecar, among good ones.

  @poison "poison that ends its process"
  @opts [steps: 2, width: 64, height: 64, timeout: 600_000]

  def run(_options) do
    mark = Chaos.mark()
    instance = Chaos.start(backoff_min: 500, backoff_max: 30_000)

    ask = fn prompt, opts ->
      StarweaveImage.generate(prompt, [instance: instance] ++ Keyword.merge(@opts, opts))
    end

    good = for n <- 1..25, do: Task.async(fn -> ask.("a fig number #{n}", seed: n) end)
    # It ends its process within 0.2 s, and must not be done before.
    poison = Task.async(fn -> ask.(@poison, steps: 100) end)
    more = for n <- 26..50, do: Task.async(fn -> ask.("a fig number #{n}", seed: n) end)

    {:error, error} = Task.await(poison, :infinity)
    {microseconds, {:error, again}} = :timer.tc(fn -> ask.(@poison, seed: 5, steps: 100) end)
    images = for {:ok, image} <- Task.await_many(good ++ more, :infinity), do: image
    deaths = Enum.count(Chaos.Watch.sidecars(instance), & &1.ended)
    Chaos.stop(instance)
    orphans = Chaos.orphans(mark)

    [
      {"the poison ends with", "#{inspect(error.kind)}, #{error.message}",
       error.kind == :sidecar_crashed},
      {"deaths of sidecars", deaths, deaths in 4..10},
      {"good requests done", "#{length(images)} of 50", length(images) == 50},
      {"most attempts of a good one", images |> Enum.map(& &1.attempts) |> Enum.max(), nil},
      {"asked again, with another seed, it is refused with",
       "#{inspect(again.kind)} after #{div(microseconds, 1000)} ms, for another #{again.details[:retry_after_ms]} ms",
       again.kind == :sidecar_crashed and is_map_key(again.details, :retry_after_ms)},
      {"processes left behind", length(orphans), orphans == []}
    ]
  end
end
