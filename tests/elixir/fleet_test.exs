defmodule StarweaveImage.FleetTest do
  use ExUnit.Case, async: true

  alias StarweaveImage.Queue.Fleet

  defp new(roles \\ [:active]) do
    layout =
      for {role, index} <- Enum.with_index(roles, 1), do: %{index: index, kind: [], role: role}

    Fleet.new(true, layout)
  end

  defp card(id, state, fields \\ %{}),
    do: Map.merge(%{id: id, aliases: [], state: state, fallbacks: nil}, fields)

  defp ready(fleet, index, catalog \\ [card("m", :available)]) do
    ready = %{
      device: "cpu",
      device_name: "a cpu",
      dtype: "float32",
      versions: %{},
      default_model: "m"
    }

    Fleet.heard(fleet, index, {:ready, Map.merge(ready, %{catalog: catalog, capacity: 2})})
  end

  defp beat(fleet, index, state, capacity) do
    seen = %{state: state, os_pid: 7, uptime_ms: 1, heartbeat: %{capacity: capacity}}
    Fleet.heard(fleet, index, {:state, seen})
  end

  describe "the owner of a sidecar" do
    test "is the one that was born last, in whatever order they are heard" do
      fleet = new()
      assert Fleet.owner(fleet, 1, {-7, :first}) == :new
      fleet = Fleet.update(fleet, 1, birth: -7, pid: :first)
      assert Fleet.owner(fleet, 1, {-7, :first}) == :present
      assert Fleet.owner(fleet, 1, {-3, :second}) == :new
      fleet = Fleet.update(fleet, 1, birth: -3, pid: :second)
      assert Fleet.owner(fleet, 1, {-7, :first}) == :former
      # Its death leaves the number behind.
      fleet = Fleet.update(fleet, 1, pid: nil)
      assert Fleet.owner(fleet, 1, {-7, :first}) == :former
      assert Fleet.owner(fleet, 1, {4, :third}) == :new
    end

    test "of a seat that was removed is nobody's" do
      assert new() |> Fleet.remove(1) |> Fleet.owner(1, {1, :first}) == :of_no_seat
    end
  end

  describe "what a sidecar says" do
    test "of its capacity counts from when it is ready" do
      fleet = new() |> beat(1, :starting, 8)
      assert Fleet.get(fleet, 1).capacity == 0
      fleet = ready(fleet, 1)
      assert Fleet.get(fleet, 1).capacity == 2
      assert fleet |> beat(1, :ready, 8) |> Fleet.get(1) |> Map.fetch!(:capacity) == 8
    end

    test "opens it for requests, until it stops, drains or ends" do
      open? = &(&1 |> Fleet.get(1) |> Fleet.open?())
      fleet = new()
      refute open?.(fleet)
      fleet = ready(fleet, 1)
      assert open?.(fleet)
      refute fleet |> Fleet.heard(1, :stopping) |> open?.()
      refute fleet |> Fleet.update(1, draining?: true) |> open?.()
      ended = fleet |> Fleet.heard(1, :stopping) |> Fleet.ended(1, :starting, "it was killed")
      refute open?.(ended)
      # The next one of the seat has not been told to stop.
      assert ended |> ready(1) |> open?.()
      refute [:standby] |> new() |> ready(1) |> open?.()
    end
  end

  describe "a spare" do
    test "takes the place of one that worked and is gone, if it is ready itself" do
      fleet = new([:active, :standby]) |> ready(1)
      gone = Fleet.ended(fleet, 1, :starting, "it was killed")
      assert Fleet.relieve(fleet) == :none
      assert Fleet.relieve(gone) == :none
      assert {:ok, 1, 2, relieved} = gone |> ready(2) |> Fleet.relieve()
      assert {Fleet.get(relieved, 1).role, Fleet.get(relieved, 2).role} == {:standby, :active}
      assert Fleet.relieve(relieved) == :none
      assert gone |> ready(2) |> Fleet.update(2, draining?: true) |> Fleet.relieve() == :none
      assert gone |> ready(2) |> Fleet.heard(2, :stopping) |> Fleet.relieve() == :none
      assert gone |> ready(2) |> Fleet.update(2, kind: [capacity: 3]) |> Fleet.relieve() == :none
    end

    test "is not needed while the first start is not over" do
      assert [:active, :standby] |> new() |> ready(2) |> Fleet.relieve() == :none
    end
  end

  describe "the state of all" do
    test "is that of the best one" do
      fleet = new([:active, :active])
      assert Fleet.state(fleet, %{}) == :starting
      fleet = Fleet.ended(fleet, 1, :down, "no Python")
      assert Fleet.state(fleet, %{}) == :starting
      fleet = Fleet.ended(fleet, 2, :down, "no Python")

      assert {Fleet.state(fleet, %{}), Fleet.down?(fleet), Fleet.reason(fleet)} ==
               {:down, true, "no Python"}

      fleet = ready(fleet, 2)
      assert Fleet.state(fleet, %{}) == :ready
      assert Fleet.state(fleet, %{2 => ["a"]}) == :busy
      assert Fleet.state(Fleet.new(false, []), %{}) == :disabled
    end

    test "closes it where nothing works or is about to" do
      assert Fleet.closed(new()) == nil
      assert %{kind: :disabled} = Fleet.closed(Fleet.new(false, []))
      down = Fleet.ended(new(), 1, :down, "no Python")
      assert %{kind: :unavailable, message: message} = Fleet.closed(down)
      assert message == "image generation is not available: no Python"
    end
  end

  test "of what several say of a model, the best counts; of those that are gone, what is not in their memory" do
    fleet =
      new([:active, :active])
      |> ready(1, [
        card("m", :absent),
        card("n", :loaded, %{aliases: ["alias"], fallbacks: ["m"]})
      ])
      |> ready(2, [card("m", :loaded), card("n", :available)])

    assert for(c <- Fleet.models(fleet), do: {c.id, c.state}) == [{"m", :loaded}, {"n", :loaded}]
    assert Fleet.canonical(fleet, "alias") == "n"
    assert Fleet.canonical(fleet, "unknown") == "unknown"
    assert {Fleet.fallbacks(fleet, "n"), Fleet.fallbacks(fleet, "unknown")} == {["m"], []}

    gone = Enum.reduce(1..2, fleet, &Fleet.ended(&2, &1, :starting, "it was killed"))

    assert for(c <- Fleet.models(gone), do: {c.id, c.state}) == [
             {"m", :absent},
             {"n", :available}
           ]
  end
end
