defmodule Chaos.Kills do
  # SIGKILL at random moments, and deaths in the middle of a frame, under a thousand requests whose bytes are known.

  alias Chaos.{Strikes, Watch}

  @moments ~w(start load denoising decoding encoding frame any denoising frame any)a

  def run(%{full?: full?, minutes: minutes}) do
    requests = if full?, do: 1_000, else: 150
    kills = if full?, do: 120, else: 10
    sums = Chaos.undisturbed(requests, sidecars: 2)

    mark = Chaos.mark()
    instance = Chaos.start(sidecars: 2)
    plan = @moments |> Stream.cycle() |> Enum.take(kills)
    plan = for moment <- plan, do: {if(moment == :frame, do: :frame, else: :kill), moment}
    done = :counters.new(1, [])
    play = fn -> Strikes.play(instance, plan, done, at_once: 1, minutes: minutes) end
    {strikes, outcomes} = Chaos.load(instance, requests, 12, sums, done, play)
    deaths = for s <- Watch.sidecars(instance), s.ended, do: s
    Chaos.stop(instance)
    orphans = Chaos.orphans(mark)

    same = for {:same, attempts} <- outcomes, do: attempts
    struck = for %{ms: ms} = strike when ms != nil <- strikes, do: strike.moment

    [
      {"distinct requests; asked for in all", "#{requests}; #{length(outcomes)}", nil},
      {"deaths of sidecars", length(deaths), length(deaths) >= length(strikes)},
      {"struck at", Chaos.tally(struck), length(struck) == length(strikes)},
      {"done with the bytes of an undisturbed run", "#{length(same)} of #{length(outcomes)}",
       length(same) == length(outcomes)},
      {"of those after more than one attempt", Enum.count(same, &(&1 > 1)), nil},
      {"most attempts of one request", Enum.max(same), nil},
      {"processes left behind", length(orphans), orphans == []}
    ]
  end
end
