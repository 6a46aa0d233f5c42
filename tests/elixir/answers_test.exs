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
          {"models", [models], [done]},
          {"stats", [%{t: :stats, id: "o"}], [models]}
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

  test "what ended long ago is forgotten, so that memory has a bound" do
    answers =
      Enum.reduce(1..1_200, Answers.new(), fn n, answers ->
        answers = Answers.asked(answers, %{t: "models", id: "m#{n}"})
        {:tell, _, answers} = Answers.heard(answers, %{t: :models, id: "m#{n}", models: []})
        answers
      end)

    assert Answers.heard(answers, %{t: :models, id: "m1"}) == :of_nobody
    assert {:error, _} = Answers.heard(answers, %{t: :models, id: "m1200"})
    assert :erlang.external_size(answers) < 100_000
  end
end
