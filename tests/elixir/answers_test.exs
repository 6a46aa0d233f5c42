defmodule StarweaveImage.AnswersTest do
  use ExUnit.Case, async: true

  alias StarweaveImage.Sidecar.Answers

  @last 0x7FFFFFFFFFFFFFFF

  defp asked(fields \\ %{}) do
    request = %{t: :generate, id: "r", seed: 7, num_images: 2, format: :png, preview: true}
    Answers.asked(Answers.new(), Map.merge(request, fields))
  end

  defp accepted(fields \\ %{}) do
    Map.merge(
      %{t: :accepted, id: "r", seeds: [7, 8], format: :png, width: 64, height: 64},
      fields
    )
  end

  defp part(data, index, fields) do
    digest = Base.encode16(:crypto.hash(:sha256, data), case: :lower)

    %{t: :image, id: "r", index: index, seed: 7 + index, format: :png, width: 64, height: 64}
    |> Map.merge(%{sha256: digest, size: byte_size(data), offset: 0, data: data})
    |> Map.merge(fields)
  end

  defp halves(data, index) do
    half = div(byte_size(data), 2)
    <<one::binary-size(half), other::binary>> = data
    [part(data, index, %{data: one}), part(data, index, %{data: other, offset: half})]
  end

  defp done, do: %{t: :done, id: "r", model: "m", parameters: %{}, timings: %{}, notices: []}

  defp whole(answers) do
    messages = [accepted() | halves("first", 0)] ++ halves("second", 1) ++ [done()]
    hear(answers, messages)
  end

  # What is told of these messages, or the first error.
  defp hear(answers, messages) do
    Enum.reduce_while(messages, {:ok, [], answers}, fn message, {:ok, told, answers} ->
      case Answers.heard(answers, message) do
        {:tell, message, answers} -> {:cont, {:ok, told ++ [message], answers}}
        {:keep, answers} -> {:cont, {:ok, told, answers}}
        other -> {:halt, other}
      end
    end)
  end

  test "images are told whole, in order" do
    assert {:ok, told, _answers} = whole(asked())
    assert [:accepted, :image, :image, :done] == Enum.map(told, & &1.t)
    assert ["first", "second"] == for(%{t: :image, data: data} <- told, do: data)
  end

  test "the whole may be cut anywhere, and progress and previews come between" do
    progress = %{t: :progress, id: "r", image: 1, step: 1}
    preview = %{t: :preview, id: "r", image: 0, step: 1, data: "x"}
    [first, second] = halves("first", 0)
    bytes = for <<byte::binary-1 <- "second">>, do: byte

    singles =
      for {byte, at} <- Enum.with_index(bytes),
          do: part("second", 1, %{data: byte, offset: at})

    messages = [accepted(), progress, preview, first, progress, second] ++ singles ++ [done()]
    assert {:ok, told, _answers} = hear(asked(), messages)
    assert ["first", "second"] == for(%{t: :image, data: data} <- told, do: data)
  end

  # What a process may not say: after these messages, this one.
  @broken [
    {"progress before accepted", [], :progress, %{}, "it sent progress before accepted"},
    {"done before accepted", [], :done, %{}, "it sent done before accepted"},
    {"other seeds", [], :accepted, %{seeds: [8, 9]},
     "it accepted other seeds than it was asked for"},
    {"another format", [], :accepted, %{format: :jpeg},
     "it accepted another format than it was asked for"},
    {"accepted again", [:accepted], :accepted, %{},
     "it sent accepted in the middle of a request"},
    {"models", [:accepted], :models, %{}, "it sent models in the middle of a request"},
    {"progress of a third image", [:accepted], :progress, %{image: 2},
     "it sent progress of an image that nobody asked for"},
    {"a preview of a third image", [:accepted], :preview, %{image: 2},
     "it sent preview of an image that nobody asked for"},
    {"the second image first", [:accepted], :image, %{index: 1, seed: 8},
     "it sent the results of a request out of order"},
    {"a third image", [:accepted, :image, :second], :image, %{index: 2, seed: 9},
     "it sent the results of a request out of order"},
    {"an image again", [:accepted, :image], :image, %{},
     "it sent the results of a request out of order"},
    {"a part that does not begin", [:accepted], :image, %{offset: 1},
     "it sent the parts of an image out of order"},
    {"more than the size", [:accepted], :image, %{size: 4},
     "it sent the parts of an image out of order"},
    {"an image of another seed", [:accepted], :image, %{seed: 8},
     "it sent an image of another seed than it was asked for"},
    {"an image of another width", [:accepted], :image, %{width: 65},
     "it sent an image of another form than it had accepted"},
    {"an image of another height", [:accepted], :image, %{height: 65},
     "it sent an image of another form than it had accepted"},
    {"an image of another format", [:accepted], :image, %{format: :jpeg},
     "it sent an image of another form than it had accepted"},
    {"done without images", [:accepted], :done, %{}, "it sent done before all results"},
    {"done before the last image", [:accepted, :image], :done, %{},
     "it sent done before all results"},
    {"done without a model", [:accepted, :image, :second], :done, %{model: nil},
     "it sent done without its facts"},
    {"done again", [:accepted, :image, :second, :done], :done, %{},
     "it sent done of a request that it had ended"},
    {"an error after done", [:accepted, :image, :second, :done], :error, %{},
     "it sent error of a request that it had ended"},
    {"an image after done", [:accepted, :image, :second, :done], :image, %{},
     "it sent image of a request that it had ended"}
  ]

  defp said(:accepted), do: accepted()
  defp said(:image), do: part("first", 0, %{})
  defp said(:second), do: part("second", 1, %{})
  defp said(:done), do: done()
  defp said(:error), do: %{t: :error, id: "r", kind: "internal", terminal: nil}
  defp said(type) when type in [:progress, :preview], do: %{t: type, id: "r", image: 0, step: 1}
  defp said(type), do: %{t: type, id: "r"}

  for {name, before, type, fields, sentence} <- @broken do
    test "#{name}: #{sentence}" do
      before = Enum.map(unquote(before), &said/1)
      assert {:ok, _told, answers} = hear(asked(), before)
      message = Map.merge(said(unquote(type)), unquote(Macro.escape(fields)))
      assert Answers.heard(answers, message) == {:error, unquote(sentence)}
    end
  end

  test "a preview that was not asked for is an error, and one image is what is asked for by default" do
    answers = Answers.asked(Answers.new(), %{t: :generate, id: "r", seed: 7})
    assert {:ok, _, answers} = hear(answers, [accepted(%{seeds: [7]}), said(:progress)])

    assert Answers.heard(answers, said(:preview)) ==
             {:error, "it sent a preview that nobody asked for"}

    assert {:ok, [%{data: "first"}, %{t: :done}], _} = hear(answers, [said(:image), done()])

    assert Answers.heard(answers, Map.put(said(:progress), :image, 1)) ==
             {:error, "it sent progress of an image that nobody asked for"}
  end

  test "seeds go round after the last" do
    for fields <- [%{seed: @last}, %{seed: 3, variation_seed: @last}] do
      assert {:ok, _, _} = hear(asked(fields), [accepted(%{seeds: [@last, 0]})])
    end

    assert {:error, _} = hear(asked(%{seed: 3, variation_seed: 9}), [accepted(%{seeds: [3, 4]})])
    assert {:error, _} = hear(asked(), [accepted(%{seeds: [7]})])
    assert {:error, _} = hear(asked(), [accepted(%{seeds: [7, 8, 9]})])
  end

  test "each field of a part is what it was" do
    for {field, value} <- [size: 6, width: 65, height: 65, seed: 8, format: :jpeg, index: 1] do
      [one, other] = halves("first", 0)
      assert {:error, reason} = hear(asked(), [accepted(), one, %{other | field => value}])
      assert reason =~ "it sent"
      assert {:error, _} = hear(asked(), [accepted(), %{one | field => value}, other])
    end

    other_digest = part("first", 0, %{sha256: String.duplicate("0", 64)})
    assert {:error, reason} = hear(asked(), [accepted(), other_digest])
    assert reason =~ "checksum"
  end

  test "an error ends a request at any time" do
    error = %{t: :error, id: "r", kind: "timeout", terminal: nil}

    for before <- [[], [accepted()], [accepted() | halves("first", 0)]] do
      assert {:ok, told, answers} = hear(asked(), before ++ [error])
      assert List.last(told) == error
      assert {:error, reason} = hear(answers, [done()])
      assert reason == "it sent done of a request that it had ended"
    end
  end

  test "an error that says that it ends nothing ends nothing" do
    refusal = %{t: :error, id: "r", kind: "invalid_request", terminal: false}
    assert Answers.heard(asked(), refusal) == :of_nobody
    assert {:ok, _told, answers} = whole(asked())
    assert Answers.heard(answers, refusal) == :of_nobody
    assert {:error, _} = Answers.heard(answers, %{refusal | terminal: true})
  end

  test "an id that was asked again is a new request" do
    {:ok, _told, answers} = whole(asked())
    again = Answers.asked(answers, %{t: :generate, id: "r", seed: 7, num_images: 2})
    assert {:ok, told, _answers} = whole(again)
    assert length(told) == 4
  end

  test "operations are answered by what is theirs" do
    models = %{t: :models, id: "o", models: []}
    done = %{t: :done, id: "o"}
    progress = %{t: :progress, id: "o", image: 0}

    for {type, good, bad} <- [
          {"load_model", [progress, models, done], [%{t: :accepted, id: "o"}]},
          {:unload_model, [models, done], [progress]},
          {"models", [models], [done]}
        ] do
      answers = Answers.asked(Answers.new(), %{t: type, id: "o"})
      assert {:ok, ^good, ended} = hear(answers, good)
      assert {:error, _} = hear(answers, bad)
      assert {:error, _} = hear(ended, [models])
    end
  end

  test "a cancel asks for no answer, and who was never asked is nobody" do
    answers = Answers.asked(Answers.new(), %{t: "cancel", id: "r"})
    assert Answers.heard(answers, done()) == :of_nobody
    assert Answers.heard(Answers.new(), accepted()) == :of_nobody
  end

  test "of those that ended the last thousand are remembered, so that memory has a bound" do
    answers =
      Enum.reduce(1..1_200, Answers.new(), fn n, answers ->
        answers = Answers.asked(answers, %{t: "models", id: "m#{n}"})
        {:tell, _, answers} = Answers.heard(answers, %{t: :models, id: "m#{n}", models: []})
        answers
      end)

    assert Answers.heard(answers, %{t: :models, id: "m200"}) == :of_nobody
    assert {:error, _} = Answers.heard(answers, %{t: :models, id: "m201"})
    assert {:error, _} = Answers.heard(answers, %{t: :models, id: "m1200"})
    assert :erlang.external_size(answers) < 100_000
  end

  describe "a result that is no picture" do
    defp other(data, fields) do
      digest = Base.encode16(:crypto.hash(:sha256, data), case: :lower)

      %{t: :result, id: "r", index: 0, seed: 7, kind: :mesh, media_type: "a/b", facts: %{}}
      |> Map.merge(%{sha256: digest, size: byte_size(data), offset: 0, data: data})
      |> Map.merge(fields)
    end

    defp hear_others(messages),
      do: hear(asked(%{num_images: 1}), [accepted(%{seeds: [7]}) | messages])

    test "is told whole" do
      cut = [other("first", %{data: "fir"}), other("first", %{data: "st", offset: 3})]
      assert {:ok, told, _answers} = hear_others(cut ++ [done()])
      assert [%{t: :accepted}, %{t: :result, data: "first"}, %{t: :done}] = told
    end

    test "has parts that agree and follow each other, and the seed asked for" do
      for {second, said} <- [
            {%{offset: 2}, "the parts of a result out of order"},
            {%{kind: :video}, "parts of a result that do not agree"},
            {%{facts: %{"a" => 1}}, "parts of a result that do not agree"}
          ] do
        parts = [
          other("first", %{data: "fir"}),
          other("first", Map.merge(%{data: "st", offset: 3}, second))
        ]

        assert {:error, reason} = hear_others(parts)
        assert reason =~ said
      end

      assert {:error, reason} = hear_others([other("x", %{seed: 8})])
      assert reason =~ "a result of another seed"
      assert {:error, reason} = hear_others([other("x", %{index: 1})])
      assert reason =~ "out of order"
      assert {:error, reason} = hear_others([other("x", %{sha256: String.duplicate("0", 64)})])
      assert reason =~ "a result that does not match its checksum"
    end

    test "is no picture from its second part on, and as text is UTF-8" do
      [_whole, second] = halves("first", 0)
      assert {:error, reason} = hear_others([other("first", %{data: "fi"}), second])
      assert reason =~ "do not agree"

      assert {:ok, _told, _answers} = hear_others([other("ä", %{kind: :text}), done()])
      assert {:error, reason} = hear_others([other(<<255>>, %{kind: :text})])
      assert reason == "it sent a text that is not UTF-8"
    end
  end
end
